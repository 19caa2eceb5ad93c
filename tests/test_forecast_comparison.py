"""The comparison of forecasters beside the authors' package, and the error rate of alarms that are looked at after every bar."""
import base64
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml_ensemble.core import ValidationError
from ml_ensemble.forecast_comparison import alarm_delay, alarm_evidence, brier_bound, compare_scores, least_delay
from ml_ensemble.metrics import row_brier

# The example of the README of comparecast 1.0.0 (github.com/yjchoe/ComparingForecasters, MIT), run once with confseq 0.0.11,
# numpy 2.2.6, scipy 1.15.3 and Python 3.10.13, because confseq is built with Boost and not for Python 3.11:
#   data = cc.data_utils.synthetic.get_data("default", size=1000)
#   data = cc.forecast(data, ["k29_poly3", "laplace", "constant_0.5"])
#   cc.compare_forecasts(data, name_p, name_q, scoring_rule="brier", alpha=0.05)
# The forecasts of k29_poly3 were rounded to three decimals before the comparison, to be short enough for this file.
OUTCOMES = (
    "d302a94f97bf9bd8fa2d83a567c3f86c22518933df0eac57c8bfdfc5aff17b3d7efffbdf7fefd77f9bffd7b9ef7ffffdbffe902050000000050803"
    "0009305201002002021a000200300200e1ffe2feeeffdbffbffffbd7fbdf5dde99ef357df5fdfffe3f0010004300201100004d1209210202428000"
    "124aa0101b1401")
K29 = (
    "c-l=>d2r2V6utM{P_;8k#8O+)(n%RrOBt;(W-JY@y@=M9QX;k>mZr9pSc2HM*kTDH#1cVdvn50YNe~f1td+5)mTAv>c{Tmxz4v{;-~H}A=YHqh_g"
    "qEtE#E}kG)_XKmlnrhEu(3&NoL4ksj4?5K<nvY_0nt|t~E7WJL?6m>gXn|jjd>88!TO?=^dS?PqhzDqM=p9IHaSA1zL<{*lnwUc&&tCD9~@Q1iAR"
    "!I${}aqB(BpI=!o&@W%-hv#wZ*>PXWSdQCTKo;E<1R);qfCp1`p*0vg`@d})DeijkOYR%HkdP_fM<W|k)Z-1=9Wq9EqP1I0L(~{_b890IhG_U~FL"
    "XPfb#hSRORq!3$kfIxOvPNo<4$+P}T?c48_1E6IKu2m9ZK^)Hp6~l<8y&AbwWa!McWush8+9sU7qd#CHo_D3q6g-%&I9<OF7E45eatG|P#SHB<qN"
    "#f`sjs<tb0Ijv!D4Is}HprI$<)l6G>Ud0hcs_jH2|WmO(4{U^x=-1n#yBad?D}>}&J38Mew&FcP1kC*08<qtO_>;X$6h<etE|iuRTDwPWmfLwwJe"
    "Z!m(LJ<9z;9K;Yl?T$&<h*KDYmBi?e^+>`)l(Qxlg$%qyEo)~3ZHk51R*SZHOR-D5$ye~OR@U3bSq9#qI??pyI*ai&UF&(a-uBp0OSX5YVXYbKXL"
    "D_h6`+FcLMpkGwVg=8W0bZ=*3o{l$+pm*5=9KMFb@%od4y8-sdZre3Cy?FcG)2-Zgnjd*ICuwn%QaGg`3sklSw>z7+3KEVeC*gkyN!KWbl$bpvu^"
    "-2^PeDZMOq<!cN%*Cy#5EZMQ7f@~js5{9xI5iz?*aiFhWu;`iHevPiWW*4!>)K6YRf+M+U^>lKaR9Ua$gRA2y|&{HQ;n=`450rW;|ZA_PxSJPMWP"
    ";SW;IVUIOh(t=bY>*YQSpJaTB|s*KulyoI#9R7FPw6IIq@zrdv9eA=Wsw9)pzNXtSIbffmf7^8<K3^aQsU&0?2&D<UY0Xg(EoCU%0ijTI@@KVoO0"
    "Dpk$8!bn{rtS<+0>SG5wprw<SZ)OOnLOe#vyL4zS*4S;Kk@WRC20RwzO{Q>My986zWQ7$?L$?x%^r_;Ej6mdJdW<=lr!vK(UtN9IIl=AwMdoTz@2"
    "DKcJ06MxZ(=`KD#oG}BXFBwM27Fp}!Uc_mPjBuR}be?u_94do&exH+Bf*h47t_nG&T4*2M!cyI*=k<Y>Ks^}p^emm8qW3w|>hSJ<q|TRcnoPwCMA"
    "3Djh{QPr(|rlJfmbMR4Xv&9Fdyn3=0QDN#Z!D}wdtm=RK|FlWy>tgBJ5-P(mGS0ew=V2oPRs1uH%+Omt3@Tm%ehSuogTwh_0AvrKsOD<U`G!x@=E"
    "hjIaPJ!A#Aly8d)lS^I=q^kSVi^hy#Dy`)Ft>56B>5Qj`oun(*zv)m)%iFC5#yDNrrx~(LWX`B^%kxUPS!H-VbjImU$Hyz@I;Rxhph{PF$U?(SZC"
    "V3TO&J6lKnvTn(ugbH2OS?lSRImm_(v|#tIctLHhAp<+4mug0vo>}gyOBs-1t@OS%+qqPja9nC6BY1^lk1E|YZyHe&iOl=Q*$WqrW5C9Q?0KabVh"
    "Nlt(CR3LJOsmdTL#D*RtxSucbipB}cBx1$iWSa!oGLI|<ZMG!>spl^&z^FTY<!$_^@QEqxF|P0XQ60;p3z8Rgv1rh*-D*PU4ssmx5dNbTQ|8?GF;"
    "B}@L4Cw!7EujQ%SbJl()4;brsbC%x8p`O#^G+h@%MMv<N1CJxq8NQ8upYyt;Q<4AS+DTmN=$<9?(p;)}8r8mv&RR$w;dIIg&VwkjJncMLD1S*w70"
    "!zyELZ5DWTLy~LLMsznKM=H)6s9GGXI^8y{e?8_`mF-<=D@6@|=EmocI^$JTOc")
BARS = [0, 1, 2, 9, 99, 499, 998, 999]
PUBLISHED = {
    ("k29_poly3", "laplace"): {
        "low": [-10.086275260218827, -5.511887630109413, -3.776443605258127, -1.2792078580997328, -0.17146020664162653,
                -0.012333825221689028, 0.027244324731607067, 0.026823837343619976],
        "high": [10.086275260218827, 4.574387630109413, 2.947739901554424, 1.0808945105688685, 0.11210052847103147,
                 0.08054069430476421, 0.09140476159980918, 0.09100585840146486],
        "e": [1.0, 0.4822463942251895, 0.4561806086991362, 0.3352714995967932, 0.16051849181343997, 5.931828705714144,
              195539.77564187587, 169715.44551460387],
        "reversed": [1.0, 0.9264577436353508, 1.026162927389267, 0.6049573980671968, 0.691564253989277, 0.03984114525675066,
                     0.018313207777487142, 0.01825640264693578]},
    ("laplace", "constant_0.5"): {
        "low": [-10.086275260218827, -4.949387630109413, -3.447739901554424, -1.0681485522564507, -0.10983250351689076,
                -0.026301634367749644, -0.01591242201461427, -0.015906146343624944],
        "high": [10.086275260218827, 5.136887630109413, 3.276443605258127, 0.9491064997873148, 0.09189300168748578,
                 0.02886704928467439, 0.012672540888403225, 0.012650324598540109],
        "e": [1.0, 1.0525428294506067, 0.7573449753766788, 0.6381183214243566, 0.4846486850065912, 0.3842173385619914,
              0.20992897584283973, 0.20949297967807545],
        "reversed": [1.0, 0.9093641881681886, 0.9178417179128934, 0.9895138174907969, 0.9034125643284583, 0.27751661595288296,
                     0.46294526607568853, 0.4641518033266836]}}


def example_losses() -> dict[str, np.ndarray]:
    """Brier scores of the forecasters of the example."""
    y = np.unpackbits(np.frombuffer(bytes.fromhex(OUTCOMES), np.uint8))[:1000].astype(int)
    ones = np.append(0, np.cumsum(y))[:-1]
    forecasts = {"k29_poly3": np.frombuffer(zlib.decompress(base64.b85decode(K29)), "<u2") / 1000,
                 "laplace": (ones + 0.5) / np.arange(1, 1001), "constant_0.5": np.full(1000, 0.5)}
    return {name: row_brier(y, np.column_stack([1 - p, p]), (0, 1)) for name, p in forecasts.items()}


@pytest.mark.parametrize("pair", PUBLISHED, ids=" and ".join)
def test_the_construction_of_the_paper_equals_the_package_of_its_authors_on_their_example(pair):
    # a score of comparecast is 1 - loss, so its e_pq is evidence that p is better than q
    losses = example_losses()
    new, old = losses[pair[0]], losses[pair[1]]
    forward = compare_scores(old, new, mixture="gamma-exponential")
    backward = compare_scores(new, old, mixture="gamma-exponential")
    expected = PUBLISHED[pair]
    for name, values in (("low", forward.low), ("high", forward.high), ("e", np.exp(forward.log_e)), ("reversed", np.exp(backward.log_e))):
        np.testing.assert_allclose(values[BARS], expected[name], rtol=1e-9, err_msg=name)


def test_the_default_limits_are_narrower_than_those_of_the_paper():
    losses = example_losses()
    ours, paper = (compare_scores(losses["laplace"], losses["k29_poly3"], mixture=name) for name in ("discrete", "gamma-exponential"))
    assert (ours.high[50:] - ours.low[50:] < paper.high[50:] - paper.low[50:]).all()
    assert (ours.low[200:] <= ours.mean[200:]).all() and (ours.high[200:] >= ours.mean[200:]).all()


def healthy_losses(rng: np.random.Generator, bars: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Losses whose difference is a martingale difference minus `gain`, with an autocorrelated scale and heavy tails."""
    scale = np.zeros(bars)
    shocks = rng.normal(0, 0.2, bars)
    for k in range(1, bars):
        scale[k] = 0.98 * scale[k - 1] + shocks[k]
    size = np.minimum(0.1 * np.exp(scale), 0.9)
    # a rare large loss and frequent small gains, or the reverse, with a mean of exactly -gain
    rare = rng.choice([0.1, 0.5, 0.9])
    up = rng.random(bars) < rare
    noise = np.where(up, size * min(1, (1 - rare) / rare), -size * min(1, rare / (1 - rare)))
    difference = np.clip(noise, -0.9, 0.9) - gain
    return 0.5 + difference / 2, 0.5 - difference / 2


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_alarms_are_rare_in_all_bars_together_when_nothing_is_wrong(gain):
    # the hardest null: the difference plus the margin has the conditional mean 0; 0.05 within the error of 400 runs is 0.084
    alarms = 0
    for seed in range(400):
        live, baseline = healthy_losses(np.random.default_rng(seed), 2200, gain)
        alarms += bool((alarm_evidence(live, baseline, margin=gain) >= np.log(20)).any())
    assert alarms <= 0.084 * 400


@pytest.mark.parametrize("down, up, margin", [(1.0, 1.0, 0.0), (1.0, 0.05, 0.0), (0.05, 1.0, 0.0), (0.3, 0.6, 0.0), (0.02, 0.02, 0.0),
                                              (0.4, 0.5, 0.1), (1.0, 0.05, 0.3), (0.9, -0.2, 0.45)])
@pytest.mark.parametrize("each_bar", [False, True])
def test_the_mean_evidence_over_all_sequences_is_at_most_one_when_nothing_is_wrong(down, up, margin, each_bar):
    # all 2^11 sequences of differences -down or up, plus margin, with a mean of exactly 0: the definition of an e-process, without chance
    ups = (np.arange(2**11)[:, None] >> np.arange(11)) & 1
    size = np.where(np.arange(11) % 2, 1.0, 0.5)                       # the scale changes from bar to bar
    chance = (down - margin) / (up + down)
    probability = np.where(ups, chance, 1 - chance).prod(axis=1)
    moved = np.where(ups, up, -down) * size + margin * (size - 1)       # its mean is -margin at each bar
    bound = np.maximum(np.abs(moved).max(axis=0), 0.02) if each_bar else 1.0
    evidence = np.array([alarm_evidence(0.5 + row / 2, 0.5 - row / 2, margin=margin, bound=bound, every=3) for row in moved])
    assert probability.sum() == pytest.approx(1)
    mean = probability @ np.exp(evidence)
    assert (mean <= 1 + 1e-12).all() and mean.min() > 0.5
    assert probability[np.exp(evidence).max(axis=1) >= 2].sum() <= 0.5              # Ville's inequality, exactly


def test_alarms_are_rare_when_each_bar_has_a_bound_of_its_own():
    # the true probability is between the two forecasts, where both are equally good: the mean difference is 0 at every bar
    alarms = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        p = rng.uniform(0.3, 0.7, 2200)
        q = np.clip(p + rng.choice([-0.02, 0.1, 0.3], 2200) * rng.choice([0.2, 1.0], 2200), 0.02, 0.98)
        y = (rng.random(2200) < (p + q) / 2).astype(int)
        live, baseline = (np.column_stack([1 - x, x]) for x in (p, q))
        evidence = alarm_evidence(row_brier(y, live, (0, 1)), row_brier(y, baseline, (0, 1)), bound=brier_bound(live, baseline))
        alarms += bool((evidence >= np.log(20)).any())
    assert alarms <= 0.084 * 400


def test_the_bound_of_each_bar_is_the_largest_difference_over_the_outcomes_and_finds_more():
    rng = np.random.default_rng(2)
    live, baseline = rng.dirichlet([4, 4, 4], 4000), np.full((4000, 3), 1 / 3)
    bound = brier_bound(live, baseline)
    of_outcome = [np.abs(row_brier(np.full(4000, k), live, (0, 1, 2)) - row_brier(np.full(4000, k), baseline, (0, 1, 2))) for k in range(3)]
    np.testing.assert_allclose(bound, np.max(of_outcome, axis=0), atol=1e-12)
    y = rng.integers(0, 3, 4000)                                                # nothing that `live` could know
    losses = [row_brier(y, p, (0, 1, 2)) for p in (live, baseline)]
    narrow, wide = (int((alarm_evidence(*losses, bound=b) >= np.log(20)).argmax()) for b in (bound, 1.0))
    assert 0 < narrow < 0.8 * wide


def test_alarms_are_rare_with_labels_over_several_bars():
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        moving = np.convolve(rng.normal(0, 0.1, 1502), np.ones(3), "valid").clip(-0.9, 0.9)     # shared by neighbours
        alarms += bool((alarm_evidence(0.5 + moving / 2, 0.5 - moving / 2, horizon=3) >= np.log(20)).any())
    assert alarms <= 0.1 * 200


@settings(max_examples=60)
@given(data=st.data())
def test_the_evidence_depends_on_the_past_alone_and_stays_finite(data):
    loss = st.lists(st.floats(0, 1), min_size=1, max_size=120)
    live = np.array(data.draw(loss))
    baseline = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(live), max_size=len(live))))
    options = {"margin": data.draw(st.sampled_from([0.0, 0.01, 0.5])), "horizon": data.draw(st.integers(1, 4)),
               "every": data.draw(st.integers(1, 50))}
    evidence = alarm_evidence(live, baseline, **options)
    cut = data.draw(st.integers(1, len(live)))
    assert np.isfinite(evidence).all()
    np.testing.assert_allclose(alarm_evidence(live[:cut], baseline[:cut], **options), evidence[:cut], rtol=1e-12, atol=1e-12)


def test_a_long_good_past_does_not_delay_an_alarm_for_long():
    def delay(good: int) -> float:
        found = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            moved = rng.normal(np.where(np.arange(good + 4000) < good, -0.01, 0.02), 0.1).clip(-0.9, 0.9)
            reached = alarm_evidence(0.5 + moved / 2, 0.5 - moved / 2)[good:] >= np.log(20)
            found.append(reached.argmax() if reached.any() else 4000)
        return float(np.median(found))
    after_days, after_years = delay(42), delay(8000)
    assert after_years < 2 * after_days
    assert after_days < 2 * alarm_delay(0.02, 0.1, change=42)


def test_the_validated_gain_as_margin_finds_a_dead_signal_sooner():
    rng = np.random.default_rng(0)
    difference = rng.normal(np.where(np.arange(4000) < 500, -0.02, 0.01), 0.1).clip(-0.9, 0.9)
    live, baseline = 0.5 + difference / 2, 0.5 - difference / 2
    plain, half = (int((alarm_evidence(live, baseline, margin=m) >= np.log(20)).argmax()) for m in (0.0, 0.01))
    assert 500 < half < plain
    assert least_delay(difference[500:] + 0.01, bound=0.99) < half - 500


def test_versions_with_different_gains_have_a_margin_of_each_bar():
    rng = np.random.default_rng(1)
    live, baseline, bound = rng.uniform(0.2, 0.4, 800), rng.uniform(0.2, 0.4, 800), rng.uniform(0.2, 0.6, 800)
    same = alarm_evidence(live, baseline, margin=0.01, bound=bound)
    np.testing.assert_array_equal(alarm_evidence(live, baseline, margin=np.full(800, 0.01), bound=bound), same)
    later = alarm_evidence(live, baseline, margin=np.where(np.arange(800) < 400, 0.01, 0.05), bound=bound)
    np.testing.assert_array_equal(later[:400], same[:400])
    assert (later[450:] > same[450:]).all()


def test_losses_that_cannot_be_compared_are_a_named_error():
    with pytest.raises(ValidationError, match="differ by more than 1"):
        alarm_evidence([2.0], [0.0])
    with pytest.raises(ValidationError, match="every 0"):
        alarm_evidence([0.2], [0.1], every=0)
    with pytest.raises(ValidationError, match="margin is 1"):
        alarm_evidence([0.2], [0.1], margin=[1.0])
    with pytest.raises(ValidationError, match="mixture 'normal'"):
        compare_scores([0.2], [0.1], mixture="normal")
