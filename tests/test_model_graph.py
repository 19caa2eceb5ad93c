"""The graph of a model file: what training writes passes, everything else is refused before ONNX Runtime sees it."""
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from functools import cache

import numpy as np
import onnx
import pytest
from conftest import hand_made_payload
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from scratch import clean_environment

from ml_ensemble import FeatureManager, ProductionEnsemble, verification
from ml_ensemble.base_learners import make_learners
from ml_ensemble.config import load_settings
from ml_ensemble.core import IntegrityError, ModelNotFoundError, UnsafeModelError
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.labels import forward_return_labels
from ml_ensemble.model_file import read_payload
from ml_ensemble.model_graph import check_graph
from ml_ensemble.sandbox import simulate_market
from ml_ensemble.training import fit_all, make_ensemble, parity_error
from ml_ensemble.verification import probe_artefact, verify_version
from ml_ensemble.tree_graph import to_onnx
from ml_ensemble.versioning import MAX_MODEL_BYTES, ModelStore
from ml_ensemble.walk_forward import make_training_set

node, tensor = helper.make_node, helper.make_tensor


# --- graphs by hand ---------------------------------------------------------------------------------------------------


def value(name, columns, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, [None, columns])


LINKS = (node("Sigmoid", ["z"], ["p"]), node("Sub", ["one", "p"], ["q"]), node("Concat", ["q", "p"], ["probabilities"], axis=1))
LINEAR = (node("MatMul", ["view", "w"], ["z"]), *LINKS)
ONE, W = tensor("one", TensorProto.FLOAT, [1], [1.0]), tensor("w", TensorProto.FLOAT, [12, 1], [0.5] * 12)


def model(nodes=LINEAR, constants=(W, ONE), inputs=(value("view", 12),), outputs=(value("probabilities", 2),), functions=(),
          sets=(("", 17), ("ai.onnx.ml", 1)), ir=8, change=None):
    """A model as bytes; `change` edits the message before it is encoded."""
    graph = helper.make_graph(list(nodes), "by_hand", list(inputs), list(outputs), list(constants))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid(*each) for each in sets], ir_version=ir,
                             functions=list(functions), producer_name="ml_ensemble")
    if change:
        change(made)
    return made.SerializeToString()


SPLIT = {"n_targets": 1, "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [3, 0, 0],
         "nodes_values": [0.5, 0.0, 0.0], "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_truenodeids": [1, 0, 0],
         "nodes_falsenodeids": [2, 0, 0], "target_treeids": [0, 0], "target_nodeids": [1, 2], "target_ids": [0, 0],
         "target_weights": [-1.0, 1.0]}


def trees(**changes):
    """A model of one tree node, with some attributes changed; None leaves one out."""
    attributes = {name: given for name, given in {**SPLIT, **changes}.items() if given is not None}
    return model([node("TreeEnsembleRegressor", ["view"], ["z"], domain="ai.onnx.ml", **attributes), *LINKS], [ONE])


def chain(depth):
    """A tree that is one long branch."""
    count = 2 * depth + 1
    split = [k % 2 == 0 and k < 2 * depth for k in range(count)]
    leaves = [k for k in range(count) if not split[k]]
    return trees(nodes_treeids=[0] * count, nodes_nodeids=list(range(count)), nodes_featureids=[0] * count,
                 nodes_values=[0.0] * count, nodes_modes=["BRANCH_LEQ" if s else "LEAF" for s in split],
                 nodes_truenodeids=[k + 2 if s else 0 for k, s in enumerate(split)],
                 nodes_falsenodeids=[k + 1 if s else 0 for k, s in enumerate(split)], target_treeids=[0] * len(leaves),
                 target_nodeids=leaves, target_ids=[0] * len(leaves), target_weights=[0.0] * len(leaves))


def loop():
    """A loop of 2**62 turns over constants, which ONNX Runtime runs when the session is made."""
    scalar = lambda name, kind: helper.make_tensor_value_info(name, kind, [])
    one = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1])
    body = helper.make_graph([node("Identity", ["c"], ["c2"]), node("Identity", ["v"], ["v2"])], "body",
                             [scalar("i", TensorProto.INT64), scalar("c", TensorProto.BOOL), one("v")],
                             [scalar("c2", TensorProto.BOOL), one("v2")])
    return model([node("Loop", ["n", "t", "start"], ["one"], body=body), *LINEAR],
                 [W, tensor("start", TensorProto.FLOAT, [1], [1.0]), tensor("n", TensorProto.INT64, [], [2**62]),
                  tensor("t", TensorProto.BOOL, [], [True])])


def doubling(levels=30):
    """Functions that call the one before twice: a few kilobytes that stand for 2**30 nodes."""
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    calls = lambda k: [node(f"F{k - 1}", ["x"], ["a"], domain="own"), node(f"F{k - 1}", ["a"], ["y"], domain="own")]
    functions = [helper.make_function("own", f"F{k}", ["x"], ["y"], calls(k) if k else [node("Identity", ["x"], ["y"])], sets)
                 for k in range(levels + 1)]
    return model([node(f"F{levels}", ["view"], ["v"], domain="own"), node("MatMul", ["v", "w"], ["z"]), *LINKS],
                 functions=functions, sets=(("", 17), ("own", 1)))


def elsewhere(location):
    """A model whose weights are in another file."""
    made = onnx.TensorProto(name="w", data_type=1, dims=[12, 1], data_location=1)
    made.external_data.add(key="location", value=location)
    return model(constants=[made, ONE])


# --- encodings by hand ------------------------------------------------------------------------------------------------


def varint(number):
    encoded = b""
    while number > 127:
        encoded, number = encoded + bytes([number & 127 | 128]), number >> 7
    return encoded + bytes([number])


def field(number, content):
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def around(graph=None, head=b"\x08\x08", tail=field(8, b"\n\x00\x10\x11")):
    """A model around the bytes of a graph."""
    return head + field(7, plain_graph() if graph is None else graph) + tail


def plain_graph():
    return onnx.load_from_string(model()).graph.SerializeToString()


def with_attribute(encoded):
    """A graph whose Concat has these attributes."""
    last = field(1, b"q") + field(1, b"p") + field(2, b"probabilities") + field(4, b"Concat") + encoded
    made = onnx.load_from_string(model())
    nodes = b"".join(field(1, each.SerializeToString()) for each in made.graph.node[:-1]) + field(1, last)
    del made.graph.node[:]
    return around(nodes + made.graph.SerializeToString())


AXIS = field(1, b"axis") + b"\x18\x01\xa0\x01\x02"
MANY = list(range(200))


def repeated(message, *path):
    """Make an edit that adds a message to a field of the model."""
    def change(made):
        target = made
        for step in path[:-1]:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        getattr(target, path[-1]).append(message)
    return change


def assign(name, given, *path):
    """Make an edit that assigns a field of the model."""
    def change(made):
        target = made
        for step in path:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        setattr(target, name, given)
    return change


INNER = helper.make_graph([], "inner", [], [])
PAIR = onnx.StringStringEntryProto(key="a", value="b")
RUNS = {
    "a loop": loop,
    "functions that double": doubling,
    "an unused function": lambda: model(functions=[helper.make_function("own", "F", ["x"], ["y"], [node("Identity", ["x"], ["y"])],
                                                                        [helper.make_opsetid("", 17)])]),
    "external data": lambda: elsewhere("secret.bin"),
    "external data of another folder": lambda: elsewhere("../../etc/passwd"),
    "a data location without a place": lambda: model(change=assign("data_location", 1, "graph", "initializer", 0)),
    "an operator of com.microsoft": lambda: model([node("Tokenizer", ["view"], ["x"], domain="com.microsoft"), *LINEAR]),
    "an operator of an unknown domain": lambda: model([node("Sigmoid", ["view"], ["x"], domain="evil"), *LINEAR]),
    "an operator that is not written": lambda: model([node("Exp", ["view"], ["x"]), *LINEAR]),
    "random numbers": lambda: model([node("RandomNormal", [], ["x"], shape=[2**40]), *LINEAR]),
    "a condition": lambda: model([node("If", ["view"], ["x"], then_branch=INNER, else_branch=INNER), *LINEAR]),
    "a scan": lambda: model([node("Scan", ["view"], ["x"], body=INNER, num_scan_inputs=1), *LINEAR]),
    "an inner graph in a known operator": lambda: model([node("Softmax", ["view"], ["x"], axis=INNER), *LINEAR]),
    "inner graphs in a known operator": lambda: model([node("Softmax", ["view"], ["x"], axis=[INNER, INNER]), *LINEAR]),
    "a classifier": lambda: model([node("TreeEnsembleClassifier", ["view"], ["x"], domain="ai.onnx.ml"), *LINEAR]),
    "training steps": lambda: model(change=repeated(onnx.TrainingInfoProto(), "training_info")),
}
DAMAGED = {
    "nothing": lambda: b"",
    "no protobuf": lambda: b"no graph",
    "zeros": lambda: bytes(1000),
    "half of it": lambda: model()[:len(model()) // 2],
    "all but the last byte": lambda: model()[:-1],
    "one byte more": lambda: model() + b"\x00",
    "two models": lambda: model() + model(),
    "a group": lambda: b"\x0b\x0c" + model(),
    "10,000 groups": lambda: b"\x0b" * 10_000,
    "100,000 levels of messages": lambda: nest(20_000),
    "a field number of 2**29": lambda: model() + varint(2**32 | 2) + b"\x00",
    "a length beyond the end": lambda: b"\x08\x08" + b"\x3a" + varint(2**40),
    "a length of 2**64": lambda: b"\x08\x08\x3a" + b"\xff" * 9 + b"\x01",
    "a number without an end": lambda: b"\x08" + b"\xff" * 1_000_000,
    "a number longer than needed": lambda: b"\x08\x88\x00" + model()[2:],
    "fields out of order": lambda: around(head=b"", tail=field(8, b"\n\x00\x10\x11") + b"\x08\x08"),
    "a second graph": lambda: around(tail=field(7, b"") + field(8, b"\n\x00\x10\x11")),
    "a million empty nodes": lambda: around(b"\x0a\x00" * 1_000_000),
    "a million empty constants": lambda: around(field(2, b"g") + b"\x2a\x00" * 1_000_000),
    "65 nodes": lambda: model([*[node("Identity", ["view"], [f"x{k}"]) for k in range(61)], *LINEAR]),
    "another IR version": lambda: model(ir=9),
    "another operator set": lambda: model(sets=(("", 18),)),
    "an operator set of a contrib domain": lambda: model(sets=(("", 17), ("com.microsoft", 1))),
    "metadata": lambda: model(change=repeated(PAIR, "metadata_props")),
    "a sparse constant": lambda: model(change=repeated(onnx.SparseTensorProto(), "graph", "sparse_initializer")),
    "inner shapes": lambda: model(change=repeated(value("z", 1), "graph", "value_info")),
    "a quantization": lambda: model(change=repeated(onnx.TensorAnnotation(), "graph", "quantization_annotation")),
    "a description of 10 MB": lambda: model(change=assign("doc_string", "x" * 10**7)),
    "a producer of 10 MB": lambda: model(change=assign("producer_name", "x" * 10**7)),
    "an output name of 10 MB": lambda: model([node("Identity", ["view"], ["x" * 10**7]), *LINEAR]),
    "a name with a NUL": lambda: model([node("Identity", ["view"], ["x\0y"]), *LINEAR]),
    "an empty name": lambda: model([node("Identity", ["view"], [""]), *LINEAR]),
    "another input": lambda: model(inputs=[value("x", 12)]),
    "two inputs": lambda: model(inputs=[value("view", 12), value("x", 12)]),
    "an input of another width": lambda: model(inputs=[value("view", 13)]),
    "an input of float64": lambda: model(inputs=[value("view", 12, TensorProto.DOUBLE)]),
    "an input of fixed length": lambda: model(inputs=[helper.make_tensor_value_info("view", 1, [2**40, 12])]),
    "another output": lambda: model(outputs=[value("p", 1)]),
    "two outputs": lambda: model(outputs=[value("probabilities", 2), value("p", 1)]),
    "an output that is not computed": lambda: model(LINEAR[:-1]),
    "an output of another width": lambda: model([*LINEAR[:-1], node("Concat", ["q", "p", "p"], ["probabilities"], axis=1)]),
    "a name defined twice": lambda: model([*LINEAR, node("Identity", ["p"], ["q"])]),
    "a name of a constant defined again": lambda: model([node("Identity", ["view"], ["one"]), *LINEAR]),
    "two constants of one name": lambda: model(constants=[W, ONE, ONE]),
    "a constant named like the input": lambda: model(constants=[W, ONE, tensor("view", 1, [1], [1.0])]),
    "a value used before it is defined": lambda: model(LINEAR[::-1]),
    "a node that uses itself": lambda: model([node("Identity", ["x"], ["x"]), *LINEAR]),
    "a node of two outputs": lambda: model([node("Identity", ["view"], ["x", "y"]), *LINEAR]),
    "a matrix of another height": lambda: model(constants=[tensor("w", 1, [11, 1], [0.5] * 11), ONE]),
    "a matrix of two computed values": lambda: model([node("MatMul", ["view", "view"], ["x"]), *LINEAR]),
    "a sum of other widths": lambda: model([node("MatMul", ["view", "v"], ["x"]), node("Sum", ["x", "view"], ["y"]), *LINEAR],
                                           [W, ONE, tensor("v", 1, [12, 2], [0.0] * 24)]),
    "a constant in a concatenation": lambda: model([node("Concat", ["view", "one"], ["x"], axis=1), *LINEAR]),
    "too many columns": lambda: model([node("Concat", ["view"] * 22, ["x"], axis=1), *LINEAR]),
    "columns that double": lambda: model([*[node("Concat", [f"x{k}"] * 2 if k else ["view"] * 2, [f"x{k + 1}"], axis=1)
                                            for k in range(50)], *LINEAR]),
    "rows joined": lambda: model([node("Concat", ["view", "view"], ["x"], axis=0), *LINEAR]),
    "a huge dimension": lambda: model(constants=[onnx.TensorProto(name="w", data_type=1, dims=[2**62], raw_data=b""), ONE]),
    "dimensions whose product overflows": lambda: model(constants=[
        onnx.TensorProto(name="w", data_type=1, dims=[4096] * 2 + [2**44], raw_data=b""), ONE]),
    "a negative dimension": lambda: model(constants=[onnx.TensorProto(name="w", data_type=1, dims=[-1, 1], raw_data=b""), ONE]),
    "a constant without content": lambda: model(constants=[onnx.TensorProto(name="w", data_type=1, dims=[4096, 4096]), ONE]),
    "a constant that is too short": lambda: model(constants=[
        onnx.TensorProto(name="w", data_type=1, dims=[12, 1], raw_data=bytes(44)), ONE]),
    "a constant with two contents": lambda: model(constants=[
        onnx.TensorProto(name="w", data_type=1, dims=[12, 1], raw_data=bytes(48), float_data=[0.0] * 12), ONE]),
    "a constant of texts": lambda: model(constants=[tensor("w", TensorProto.STRING, [12, 1], [b"x"] * 12), ONE]),
    "a constant of NaN": lambda: model(constants=[tensor("w", 1, [12, 1], [np.nan] * 12), ONE]),
    "an attribute twice": lambda: with_attribute(field(5, AXIS) * 2),
    "a million attributes": lambda: with_attribute(field(5, AXIS) * 1_000_000),
    "an attribute without a name": lambda: with_attribute(field(5, AXIS[6:])),
    "an empty attribute": lambda: with_attribute(field(5, b"")),
    "an attribute whose name is longer than it": lambda: with_attribute(field(5, b"\x0a\x7faxis\x18\x01\xa0\x01\x02")),
    "an attribute that refers to another": lambda: with_attribute(field(5, AXIS + field(21, b"axis"))),
    "an unknown attribute": lambda: model([node("Softmax", ["view"], ["x"], axis=1, other=1), *LINEAR]),
    "a tensor as an attribute": lambda: model([node("Softmax", ["view"], ["x"], axis=W), *LINEAR]),
    "integers that are packed": lambda: packed(),
    "self-children": lambda: trees(nodes_truenodeids=[0, 0, 0]),
    "a cycle": lambda: trees(nodes_modes=["BRANCH_LEQ", "BRANCH_LEQ", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 2, 0]),
    "a node of two parents": lambda: trees(nodes_falsenodeids=[1, 0, 0]),
    "a child out of range": lambda: trees(nodes_falsenodeids=[3, 0, 0]),
    "a child of 2**27": lambda: trees(nodes_falsenodeids=[2**27, 0, 0]),
    "a child of 2**62": lambda: trees(nodes_falsenodeids=[2**62, 0, 0]),
    "a negative child": lambda: trees(nodes_falsenodeids=[-1, 0, 0]),
    "a leaf with children": lambda: trees(nodes_truenodeids=[1, 2, 0]),
    "a chain of 300 levels": lambda: chain(300),
    "a chain of 100,000 nodes": lambda: chain(100_000),
    "a gap in the trees": lambda: trees(nodes_treeids=[0, 0, 7]),
    "trees of large numbers": lambda: trees(nodes_treeids=[2**40] * 3),
    "nodes out of order": lambda: trees(nodes_nodeids=[0, 2, 1]),
    "an input out of range": lambda: trees(nodes_featureids=[12, 0, 0]),
    "an input of 2**62": lambda: trees(nodes_featureids=[2**62, 0, 0]),
    "an output out of range": lambda: trees(target_ids=[0, 1]),
    "2**40 outputs": lambda: trees(n_targets=2**40),
    "no outputs": lambda: trees(n_targets=0),
    "a leaf out of range": lambda: trees(target_nodeids=[1, 3]),
    "a value for a split": lambda: trees(target_nodeids=[0, 1]),
    "a value twice": lambda: trees(target_nodeids=[1, 1]),
    "lists of different lengths": lambda: trees(nodes_values=[0.5, 0.0]),
    "weights of another length": lambda: trees(target_weights=[0.0] * 3),
    "an empty list": lambda: emptied("nodes_values"),
    "a missing list": lambda: trees(nodes_values=None),
    "a threshold of NaN": lambda: trees(nodes_values=[float("nan"), 0.0, 0.0]),
    "an infinite weight": lambda: trees(target_weights=[float("inf"), 0.0]),
    "another comparison": lambda: trees(nodes_modes=["BRANCH_EQ", "LEAF", "LEAF"]),
    "another aggregate": lambda: trees(aggregate_function="MAX"),
    "a transformation": lambda: trees(post_transform="PROBIT"),
    "two base values": lambda: trees(base_values=[0.0, 0.0]),
    "a mode of 10 MB": lambda: trees(nodes_modes=["BRANCH_LEQ", "LEAF", "L" * 10**7]),
    "20 million node ids": lambda: many(20_000_000),
    "eight lists of 2 million entries": lambda: raw_attribute(
        b"\x40\x80\x01" * 2**21, 7, *(name.encode() for name in SPLIT if name.endswith("ids"))),
    "7 million modes": lambda: raw_attribute(b"J\x04LEAF" * 7_000_000, 8, b"nodes_modes"),
}


def nest(levels):
    """Messages within messages, as deep as that."""
    content = b""
    for _ in range(levels):
        content = field(7, content)
    return b"\x08\x08" + content


def raw_attribute(content, kind, *names):
    """A model of one tree node that has only these attributes, all of this content."""
    encoded = b"".join(field(5, field(1, name) + content + b"\xa0\x01" + bytes([kind])) for name in names or [b"nodes_nodeids"])
    inner = field(1, b"view") + field(2, b"z") + field(4, b"TreeEnsembleRegressor") + encoded + field(7, b"ai.onnx.ml")
    shapes = b"".join(field(number, value(name, size).SerializeToString())
                      for number, name, size in ((11, "view", 12), (12, "probabilities", 2)))
    return around(field(1, inner) + field(2, b"g") + shapes, tail=field(8, b"\n\x00\x10\x11") + field(8, b"\n\nai.onnx.ml\x10\x01"))


def packed():
    return raw_attribute(field(8, bytes(range(100))), 7)


def emptied(name):
    """A tree without the entries of one list."""
    made = onnx.load_from_string(trees())
    del next(attribute for attribute in made.graph.node[0].attribute if attribute.name == name).floats[:]
    return made.SerializeToString()


def many(count):
    return raw_attribute(b"\x40\x01" * count, 7)


HOSTILE = RUNS | DAMAGED


def file_of(graph):
    """A model file that holds this graph; nothing of it was checked when it was written."""
    class Unchecked:
        def __reduce__(self):
            return restore_ensemble, (hand_made_payload() | {"model": graph},)
    return pickle.dumps(Unchecked(), protocol=5)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_graph_is_a_named_error_within_2_seconds_and_300_megabytes(store, name):
    store.promote(file_of(HOSTILE[name]()), {"created_at": "2025-09-01T00:00:00Z"})
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(UnsafeModelError if name in RUNS else IntegrityError, match="graph of the model file") as refusal:
            ProductionEnsemble(store=store)
        assert time.perf_counter() - start < 2 and tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    assert len(str(refusal.value)) < 400 and refusal.value.remedy


def test_the_graphs_these_are_made_from_pass():
    for graph in (model(), trees(), trees(base_values=[0.5]), trees(nodes_modes=["BRANCH_LT", "LEAF", "LEAF"]), chain(255),
                  model(sets=(("", 17),)), around(), with_attribute(field(5, AXIS))):
        check_graph(graph, 12, 2)


SESSION = """
import sys
from ml_ensemble.inference import make_session
import numpy as np
session = make_session(sys.stdin.buffer.read())
print(session.run(None, {"view": np.ones((1, 12), np.float32)})[0][0, 1])
"""


def in_a_session(graph, seconds, folder):
    """What ONNX Runtime makes of a graph that nobody checked, in a process of its own."""
    return subprocess.run([sys.executable, "-c", SESSION], input=graph, capture_output=True, timeout=seconds, cwd=folder,
                          env=clean_environment())


@pytest.mark.untraced
def test_the_hostile_graphs_are_hostile(tmp_path):
    """Without the check they end the process, load for ever, or read files: the refusals above refuse something."""
    (tmp_path / "secret.bin").write_bytes(np.full(12, 0.25, dtype=np.float32).tobytes())
    assert in_a_session(chain(100_000), 60, tmp_path).returncode < 0
    for graph in (loop(), doubling()):
        with pytest.raises(subprocess.TimeoutExpired):
            in_a_session(graph, 4, tmp_path)
    assert float(in_a_session(elsewhere("secret.bin"), 60, tmp_path).stdout) == pytest.approx(1 / (1 + np.exp(-3)))


def test_a_model_file_above_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "model.pkl", "wb") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    with pytest.raises(ModelNotFoundError, match="limit is"):
        ProductionEnsemble.load(tmp_path / "model.pkl")
    with pytest.raises(IntegrityError, match="limit is"):
        read_payload(bytes(MAX_MODEL_BYTES + 1))


# --- what training writes passes --------------------------------------------------------------------------------------


@cache
def training_set(classes):
    candles = simulate_market(1500, seed=3)[0]
    return make_training_set(FeatureManager(), candles, forward_return_labels(candles, classes=classes), classes)


SMALL = ("n_estimators=20", "learning_rate=0.1")
WRITERS = {
    "the default": (), "a stump": ("lightgbm.min_child_samples=5000",),
    "boosting by dart": ("lightgbm.boosting_type=dart",),
    "leaves without a limit": ("lightgbm.num_leaves=900", "lightgbm.min_child_samples=1", "lightgbm.reg_lambda=0"),
    "growth by loss": ("xgboost.grow_policy=lossguide", "xgboost.max_leaves=63", "xgboost.max_depth=0"),
    "pruned by gamma": ("xgboost.gamma=2.0", "xgboost.max_depth=9", "xgboost.min_child_weight=0"),
    "parallel trees": ("xgboost.num_parallel_tree=3",),
    "depth without a limit": ("random_forest.max_depth=null", "random_forest.min_samples_leaf=1"),
    "best-first forests": ("random_forest.max_depth=null", "random_forest.max_leaf_nodes=200"),
}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", WRITERS)
def test_every_graph_that_training_writes_passes_and_predicts_as_the_learners(name, classes):
    data, chosen = training_set(classes), load_settings([*SMALL, *WRITERS[name]])
    learners, weights = make_learners(chosen.learners.model_dump(), 1), chosen.ensemble.weights.model_dump()
    fit_all(data, learners)
    check_graph(to_onnx(learners, weights, classes, 12), 12, classes)
    model = make_ensemble(data, learners, weights, 0.5)
    assert parity_error(model, data, learners, weights) < 1e-6
    with pytest.raises(IntegrityError):
        check_graph(to_onnx(learners, weights, classes, 12), 11, classes)


def test_a_graph_of_the_older_form_passes_and_predicts_as_before():
    """Older model files: trees over the inputs and the negated inputs, here with every second split turned."""
    data, chosen = training_set(2), load_settings(SMALL)
    learners = fit_all(data, make_learners(chosen.learners.model_dump(), 1))
    model = make_ensemble(data, learners, chosen.ensemble.weights.model_dump(), 0.5)
    expected, graph = model.predict_proba(data.features), onnx.load_from_string(read_payload(model.to_bytes())["model"])
    for each in graph.graph.node:
        if each.op_type == "TreeEnsembleRegressor":
            each.input[:] = ["both"]
            a = {attribute.name: attribute for attribute in each.attribute}
            for k in range(0, len(a["nodes_modes"].strings), 2):
                value = np.float32(a["nodes_values"].floats[k])
                if a["nodes_modes"].strings[k] != b"BRANCH_LEQ" or abs(value) < np.finfo(np.float32).tiny:
                    continue
                a["nodes_featureids"].ints[k] += 12                       # x <= t is not -x <= the float32 below -t
                a["nodes_values"].floats[k] = -np.nextafter(value, np.float32(np.inf))
                yes, no = a["nodes_truenodeids"].ints[k], a["nodes_falsenodeids"].ints[k]
                a["nodes_truenodeids"].ints[k], a["nodes_falsenodeids"].ints[k] = no, yes
    nodes = [node("Neg", ["view"], ["negative"]), node("Concat", ["view", "negative"], ["both"], axis=1), *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    older = restore_ensemble(read_payload(model.to_bytes()) | {"model": graph.SerializeToString()})
    assert older.predict_proba(data.features).tobytes() == expected.tobytes()


# --- mutations --------------------------------------------------------------------------------------------------------

MUTANTS = """
import base64, json, sys
from ml_ensemble.core import MLEnsembleError
from ml_ensemble.ensemble import restore_ensemble
from ml_ensemble.model_file import read_payload
payload, graphs = read_payload(open(sys.argv[1], "rb").read()), json.load(sys.stdin)
for number, graph in enumerate(graphs):
    try:
        restore_ensemble(payload | {"model": base64.b64decode(graph)})
        print(number, "loads", flush=True)
    except MLEnsembleError as error:
        print(number, type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A file of a model of a few trees of each learner."""
    data, chosen = training_set(2), load_settings(["n_estimators=2", "xgboost.max_depth=2", "random_forest.max_depth=2"])
    learners = fit_all(data, make_learners(chosen.learners.model_dump(), 1))
    path = tmp_path_factory.mktemp("small") / "model.pkl"
    path.write_bytes(make_ensemble(data, learners, chosen.ensemble.weights.model_dump(), 0.5).to_bytes())
    return path


def mutations(size):
    """A few edits of a graph of so many bytes: a place, how many bytes go, and what comes."""
    edit = st.tuples(st.integers(0, size - 1), st.integers(0, 3), st.binary(max_size=3))
    return st.lists(st.lists(edit, min_size=1, max_size=2), min_size=120, max_size=120)


def test_a_mutated_graph_is_a_named_error_or_a_model_and_never_a_crash(small_model):
    import base64
    graph, results = read_payload(small_model.read_bytes())["model"], []

    @settings(max_examples=6, derandomize=True, deadline=None)
    @given(mutations(len(graph)))
    def check(batch):
        mutants = []
        for edits in batch:
            mutant = graph
            for place, gone, new in edits:
                mutant = mutant[:place] + new + mutant[place + gone:]
            mutants.append(base64.b64encode(mutant).decode())
        done = subprocess.run([sys.executable, "-c", MUTANTS, str(small_model)], input=json.dumps(mutants), text=True,
                              capture_output=True, timeout=60, env=clean_environment())
        assert done.returncode == 0, done.stderr[-500:]
        results.extend(line.split()[1] for line in done.stdout.splitlines())
        assert len(done.stdout.splitlines()) == len(mutants)

    check()
    assert set(results) <= {"loads", "IntegrityError", "UnsafeModelError"} and {"loads", "IntegrityError"} <= set(results)


# --- the verification in a fresh process ------------------------------------------------------------------------------


def test_the_verification_has_a_time_limit(small_model, monkeypatch):
    monkeypatch.setattr(verification, "_PROBE_SECONDS", 0.01)
    with pytest.raises(IntegrityError, match="took longer than 0.01 s"):
        probe_artefact(small_model)


@pytest.mark.parametrize("script, reason", [
    ("import os; os.abort()", "ended with status -6"), ("import sys; sys.exit(3)", "ended with status 3"),
    ("import sys; sys.stderr.write('x' * 10**8); sys.exit(1)", "could not load model.pkl: xxx"),
    ("print('{' * 10**6)", "returned no figures")])
def test_a_verification_that_ends_oddly_is_a_short_named_error(small_model, monkeypatch, script, reason):
    monkeypatch.setattr(verification, "_PROBE", script)
    with pytest.raises(IntegrityError, match=reason) as refusal:
        probe_artefact(small_model)
    assert len(str(refusal.value)) < 1000


def test_the_verification_imports_nothing_from_the_working_directory_or_named_by_metadata(tmp_path, monkeypatch):
    store, marker = ModelStore(tmp_path / "models"), tmp_path / "ran"
    named = store.promote(restore_ensemble(hand_made_payload()).to_bytes(), {
        "created_at": "2025-09-01T00:00:00Z", "configuration": {"features": {"custom": ["evil:feature"]}}})["version"]
    for folder, module in ((tmp_path / "here", "json"), (tmp_path / "library", "evil")):
        folder.mkdir()
        (folder / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path / "library"))
    path = store.archive / f"production_ensemble_{named}.pkl"
    assert verify_version(path)["latency_ms"] > 0 and not marker.exists()
    with pytest.raises(IntegrityError, match="evil"):
        verify_version(path, ["evil:feature"])                  # declared by a configuration: imported
    assert marker.exists()
