"""The public names of each module, and what public promises: one definition, a docstring, no surprise."""
import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A name that joins or leaves a module's public names changes this list, on purpose and in review.
PUBLIC = {
    "alerts": "Alert send_alert",
    "audit_report": "ReportFile find_report render_or_warn report_html tidy_report",
    "backtest": "Backtest Performance backtest deflated_sharpe performance plot_equity",
    "base_learners": """
        Fitting MAX_PROBA class_shares encode fit_learner gain_shares make_learners predict_learner with_every_class
    """,
    "blending": """
        Blend BlendConfig BlendResult calibration_kind fit_blend fit_calibration learn_weights prob_of_true_class
        walk_forward_blend
    """,
    "candle_columns": "ReadOptions candles_of find_roles known_headings table_with_time tidy",
    "candle_files": "FileLayout absolute_path expand_path read_candle_files",
    "candle_schema": """
        DataQuality REPAIRS REPEATED data_quality implausible_steps mend_rounding minute_text off_grid ohlcv_schema
        quality_table repair share_of_repeated_opens validate
    """,
    "candle_times": "TimeFormat are_times read_times",
    "candles": """
        CALENDARS MISSING_TIME NO_NUMBERS OHLCV PRICES Rule VALUE_RULES all_valid bar_interval bar_times check_ohlcv
        fault_of moment_of ohlcv_columns ohlcv_rules price_columns
    """,
    "champion": """
        Comparison ProductionRecord compare_recipes compare_with_record production_periods production_record
        times_in_utc
    """,
    "classifier": "EnsembleClassifier",
    "cli": """
        app audit_command backup candles_command check cli_main diff_command export history keygen_command
        monitor_app monitor_check_command monitor_export_command monitor_metrics_command monitor_report_command
        monitor_serve_command monitor_update_command
        overdue_command pin_command predict promote_command prune_command publish_command pull_store_command
        push_store_command report_command restore_command retrain_command rollback run_command shadow_command
        show_command sign_command unpin_command verify_command versions_command
    """,
    "compiled_trees": "SplitGraph compiled_loop split_graph",
    "config": """
        AuditSettings DataSettings EnsembleSettings EvaluationSettings FeatureSettings GateSettings LabelSettings
        LearnerSettings LearnersSettings LightGBMSettings MonitorSettings ProductionSettings RandomForestSettings
        Section Settings ShadowSettings StoreSettings TradingSettings TrainingSettings ValidationSettings
        WeightSettings XGBoostSettings core_tree expand_override feature_manager leaf_paths load_settings set_policy
    """,
    "core": """
        AmbiguousDataError ChangedMeaningError ColumnTypeError ConfigError DataError DuplicateError EmptyDataError
        FeatureError GapError HighLowError InfiniteValueError IntegrityError LFSPointerError MLEnsembleError
        MarkdownRepr MissingColumnError MissingExtraError MissingValueError ModelNotFoundError NegativeValueError
        NotATableError RetrainError SignatureError StaleDataError StaleStoreError StoreError TimestampError
        TooShortError UnsafeModelError UnsortedError ValidationError canonical_json check_replaceable
        check_store_url core_file dashboard_file explain_os_error find_project format_number format_percent format_return
        hide_credentials in_threads in_utc iso models_dir n_threads page_file project_root read_regular
        readable_json requires_extra sha256_hex shorten sync_directory usable_cpus utc_now version_id
        working_directory write_atomic
    """,
    "custom_features": "CustomFeature Window WindowBuffer custom_columns custom_feature load_custom",
    "drift": "BatchComparison DriftAlarm DriftReport REFERENCE_VERSION STATISTICS compare_with_batch feature_reference measure_drift",
    "ensemble": "ProductionEnsemble canary_rows closed_bars load_file metadata_beside prediction_row restore_ensemble",
    "entry_point": "main",
    "evaluation": """
        Evaluation baselines bootstrap_skills diebold_mariano evaluate intervals paired_skill_difference per_fold
        permutation_importance plot_confusion plot_folds plot_importance plot_reliability plot_roc_pr
        plot_skill_over_time row_metrics
    """,
    "exchange": """
        CandleCacheError ExchangeAccessError ExchangeDataError ExchangeHistory ExchangeUnavailableError
        MarketNotFoundError cache_folder exchange_client fetch_candles
    """,
    "feature_manager": """
        ATR FEATURE_NAMES Feature FeatureManager FeatureStream INDICATOR_VERSION INPUT_NAMES check_order_file
        input_names model_inputs_of scale_free scale_free_row
    """,
    "first_page": "Page first_page page_table provenance read_candidate what_would_change",
    "fleet": "judge_fleet",
    "forecast_comparison": """
        ScoreComparison alarm_delay alarm_evidence bars_until_decided brier_bound compare_scores least_delay plot_comparison
    """,
    "indicators": """
        COMPILE_FROM MAX_NUMBER MIN_PRICE STATE WARMUP WINDOW compile_kernel compile_or_warn compiled compute feed
        is_valid_bar new_memory new_state pays_to_compile read_only update_bar
    """,
    "inference": """
        BatchGraph DAY_NS EPOCH ForkLock Graph LoadedModel calibrate decide_rows in_limits make_session open_payload
        plain_numbers predict_proba predict_row range_limits range_violation run_graph single_row time_ns training_range warmup_reason
    """,
    "labels": "METHODS average_uniqueness forward_return_labels make_labels next_returns triple_barrier_labels",
    "last_version": "InputDrift LastVersion input_drift last_version newest_training_bar",
    "leakage_audit": """
        AuditFinding AuditReport FoldResult OneFold Pipeline Rows audit check_causality check_entry check_shuffled
        check_stream inputs_of join_rows project_pipeline view_bar_by_bar view_windows
    """,
    "learner_parameters": "FIXED LEARNERS accepted_names did_you_mean free_names learners_with own_name own_names",
    "live": """
        CLASS_NAMES Decision LiveStream ServingState bar_interval_ns check_bars decide_bar decide_values
        read_history split_unfinished unfinished_bar warm_stream
    """,
    "live_alarms": """
        AlarmChanges CONDITION_KINDS Condition LiveQuality LiveState alert_unusable compare_features live_drift
        live_state measure_quality note_retrain note_usable record_conditions send_alarms
    """,
    "live_performance": """
        LiveFigures LiveRows SkillTest bar_returns live_figures live_rows plot_live_skill plot_skill_tests
        skill_tests validated_gain version_figures
    """,
    "market_data": """
        CandleReport Market bar_sample has_same_bars inspect_candles load_candles settings_of_source write_candles
    """,
    "metrics": """
        accuracy calibration_error confusion_matrix f1_scores macro_f1 matthews_correlation mean_roc_auc one_hot
        precision_recall reliability_bins roc_auc row_brier row_log_loss skill_score weighted_f1
    """,
    "model_file": "CANARY_TOLERANCE FORMAT check_definition check_payload read_payload",
    "model_graph": "check_graph",
    "monitor_database": """
        ALARMS LOGS MonitorDatabase OUTCOMES PREDICTIONS UPDATES export_parquet migrate read_shadow_lines
    """,
    "monitor_metrics": "live_metrics metrics_text read_open_alarms",
    "monitor_report": """
        alarm_table data_table live_predictions newest_decisions reliability_figure shadow_beside_production
        state_page versions_side_by_side write_monitor_report
    """,
    "monitor_server": "Snapshot serve serve_monitor take_snapshot",
    "monitor_update": """
        MonitorUpdate check_market collect_log log_paths monitor_folder open_database update_monitoring
    """,
    "monitoring": "Diagnosis HealthCheck diagnose run_overdue",
    "onnx_export": "export_onnx load_with_custom to_full_onnx",
    "plot_style": "BLUE GREY GRID INK ORANGE ReportFigure class_colour date_axis new_axes plot_recent style_axes",
    "prediction_log": """
        COLUMNS PredictionLog PredictionRow SCHEMA STAGES append_rows dropped_rows from_record read_log read_records
        to_record
    """,
    "publishing": "ARTIFACT Publication PublishError plain_line publish",
    "quality_gate": "GateInput judge",
    "recipe": """
        blend_config blend_learners fitting_options n_workers new_learners out_of_fold recipe_classes recipe_labels
        recipe_splitter threshold_objective training_set
    """,
    "remote_copies": "PullResult PushResult RemoteError pull_store push_store",
    "retrain_steps": """
        Candidate LabelEconomics blend_table candidate_table champion_recipe check_first_fold
        compare_with_production ensemble_gain evaluate_blend evaluate_result feature_table fit_candidate fold_table
        gain_sentence importance label_balance label_economics learner_evaluations learner_table market_label
        monitoring_reference rarest_class reach_verdict reachable_skill run_audit run_backtest run_money_bridge
        run_skill_sources stage trading_facts
    """,
    "retraining": "IN_SHADOW NO_NEW_BARS REFUSED_BEFORE RetrainResult STAGED execute retrain",
    "run_settings": """
        WEEKLY_NOTEBOOK checkpoint_folder get_market notebook_settings run_overrides split_overrides staging_folder
    """,
    "sandbox": "CLUSTERING QUOTED_SPREAD STRENGTH VOLATILITY bar_length best_skill signal simulate_market true_probability",
    "shadow": """
        KEEP PROMOTE PairedPredictions ShadowVerdict UNDECIDED judge_pairs open_version pair_predictions
        predicted_rows promote_from_shadow replay_rows shadow_verdict version_labels
    """,
    "signing": """
        check_mark check_signature generate_key key_id public_key public_of public_text raise_mark read_mark sign_metadata
        state_folder
    """,
    "skill_sources": """
        Money SkillSources above_zero known_rows log_odds money_bridge plot_waterfall skill_sources stacked_loss
        use_of_probabilities volatility_forecast volatility_inputs
    """,
    "trading_costs": "entry_delay known_spread net_returns plot_spread positions rolling_spread side_cost",
    "store_records": """
        MAX_HISTORY_BYTES MAX_METADATA_BYTES MAX_SEQUENCE VERSION changed_meaning check_chain check_fields
        check_metadata decision_settings history_line history_until meaning meaning_digest missing_lines parse_history
        parse_json parse_metadata
    """,
    "text_tables": "TextLayout TextTable read_text_table",
    "training": "fit_all make_ensemble parity_error trained_proba",
    "tree_graph": "READERS Tree to_onnx",
    "validation": "CombinatorialPurgedSplit PurgedWalkForward assemble_paths block_edges index_ns walk_forward_splits",
    "verdict": "Criterion Verdict",
    "verification": "probe_artefact verify_version",
    "versioning": """
        CHANGES MAX_MODEL_BYTES METADATA_FILE MODEL_FILE ModelStore adopt_shadow adopt_version archived
        check_reason check_version extend_history next_version present_or_damaged production_changes put_back read_any
        read_archived read_bytes read_exact read_history_file read_metadata read_pair read_shadow read_signed
        read_staged remedy_for_damage verify_bytes write_store_file
    """,
    "versions": "VersionDiff diff_metadata diff_versions plot_versions version_table",
    "walk_forward": """
        Predictions TrainingSet WalkForwardResult check_class_labels check_probabilities is_complete make_training_set
        walk_forward weighted_mean
    """,
}


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_a_module_exports_the_public_names_of_this_list(module):
    assert sorted(import_module(f"ml_ensemble.{module}").__all__) == sorted(PUBLIC[module].split())


def test_every_module_is_in_the_list():
    assert {path.stem for path in (ROOT / "ml_ensemble").glob("*.py")} - {"__init__", "_modidx"} == set(PUBLIC)


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_every_public_class_and_function_has_a_docstring(module):
    for name in PUBLIC[module].split():
        thing = getattr(import_module(f"ml_ensemble.{module}"), name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), name


def test_no_class_or_function_name_is_defined_in_two_modules():
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "ml_ensemble").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                places.setdefault(node.name, []).append(path.stem)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}
