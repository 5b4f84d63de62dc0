"""ONNX models as op programs: operators against onnx's own evaluator, what is refused, two trained models."""

import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import hw
from hw.onnx_nodes import NODES
from ref.fetch import cached

RNG = np.random.default_rng(0)
EPS = 2.0**-23
draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
ints = lambda *values: np.array(values, np.int64)
X, Y, POSITIVE = draw(2, 3, 4), draw(3, 1), np.abs(draw(2, 3, 4)) + np.float32(0.1)
TEST, IMAGE, ROW = X > 0, draw(2, 4, 7, 6), np.array([1, -1, 0], np.int64)
BYTES = RNG.integers(0, 255, (3, 4)).astype(np.uint8)


def model(op, inputs, *, n_out=1, opset=20, open_axis=None, **attributes):
    """(bytes, feed): one node; inputs: arrays are fed, (array,) is stored in the file, None is left out."""
    names, feed, stored, declared = [], {}, [], []
    for n, x in enumerate(inputs):
        names.append("" if x is None else f"x.{n}")
        if isinstance(x, tuple):
            stored.append(numpy_helper.from_array(x[0], names[-1]))
        elif x is not None:
            shape = [open_axis if open_axis and d == 0 else k for d, k in enumerate(x.shape)]
            kind = helper.np_dtype_to_tensor_dtype(x.dtype)
            declared.append(helper.make_tensor_value_info(names[-1], kind, shape))
            feed[names[-1]] = x
    outs = [f"y{n}" for n in range(n_out)]
    node = helper.make_node(op, names, outs, name=f"/part/{op}", **attributes)
    results = [helper.make_empty_tensor_value_info(o) for o in outs]
    graph = helper.make_graph([node], "one", declared, results, stored)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), feed


CASES = {
    **{op: (X, Y) for op in ("Add", "Sub", "Mul", "Div", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")},
    **{op: (X,) for op in ("Neg", "Abs", "Exp", "Erf", "Tanh", "Sigmoid", "Sign", "Floor", "Ceil")},
    **{op: (X,) for op in ("Sin", "Cos", "Round", "Relu", "LeakyRelu", "HardSigmoid", "HardSwish")},
    **{op: (X,) for op in ("Softplus", "Gelu", "Identity", "Dropout", "Flatten", "Shape")},
    **{op: (X,) for op in ("ReduceSum", "ReduceMean", "Softmax")},
    **{op: (POSITIVE,) for op in ("Log", "Sqrt", "Reciprocal")},
    **{op: (TEST, TEST[:1]) for op in ("And", "Or", "Xor")},
    **{op: (X, Y, draw(4)) for op in ("Max", "Min", "Sum")},
    **{op: (BYTES, BYTES[::-1].copy()) for op in ("BitwiseAnd", "BitwiseOr")},
    "Not": (TEST,),
    "BitwiseNot": (BYTES,),
    "Equal": (ROW, ints(1)),
    "Where": (TEST, X, Y),
    "IsNaN": (np.where(TEST, X, np.float32(np.nan)),),
    "Pow": (POSITIVE, draw(4)),
    "Pow 2": ("Pow", X, (np.float32(2),)),
    "Pow half": ("Pow", POSITIVE, (np.float32(0.5),)),
    "Cast": (X, {"to": TensorProto.INT32}),
    "Clip": (X, (np.float32(-0.5),), (np.float32(0.5),)),
    "Clip above": ("Clip", X, None, (np.float32(0.5),)),
    "Gelu tanh": ("Gelu", X, {"approximate": "tanh"}),
    "ReduceMax": (X, (ints(1, -1),), {"keepdims": 0}),
    "ReduceMin": (X, (ints(0),)),
    "ReduceMean 13": ("ReduceMean", X, {"axes": [-1], "opset": 13}),
    "ReduceSum none": ("ReduceSum", X, (np.zeros(0, np.int64),), {"noop_with_empty_axes": 1}),
    "ArgMax": (X, {"axis": -1}),
    "ArgMin": (X, {"axis": 1, "keepdims": 0}),
    "Softmax axis": ("Softmax", X, {"axis": 1}),
    "Softmax 11": ("Softmax", X[0], {"axis": 1, "opset": 11}),
    "LayerNormalization": (X, (draw(4),), (draw(4),), {"epsilon": 1e-3}),
    "LayerNormalization two": ("LayerNormalization", X, (draw(3, 4),), {"axis": 1}),
    "BatchNormalization": (IMAGE, (draw(4),), (draw(4),), (draw(4),), (POSITIVE[0, 0],)),
    "MatMul": (X, (draw(4, 5),)),
    "MatMul batches": ("MatMul", draw(5, 1, 3, 4), draw(2, 4, 6)),
    "MatMul vectors": ("MatMul", draw(4), draw(2, 4, 3)),
    "MatMul vector": ("MatMul", X, draw(4)),
    "Gemm": (draw(4, 3), (draw(5, 4),), (draw(5),), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Gemm plain": ("Gemm", draw(3, 4), (draw(4, 5),)),
    "MatMulInteger": (BYTES, BYTES.T.copy(), np.uint8(7), np.uint8(3)),
    "Conv": (IMAGE, (draw(6, 2, 3, 3),), (draw(6),), {"group": 2, "strides": [2, 1], "pads": [1, 0, 0, 2]}),
    "Conv same": ("Conv", IMAGE, (draw(3, 4, 3, 2),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "Conv dilated": ("Conv", draw(1, 2, 11), (draw(3, 2, 3),), {"dilations": [2]}),
    "ConvTranspose": (IMAGE, (draw(4, 3, 4, 3),), (draw(3),), {"strides": [2, 3], "pads": [1, 0, 1, 1]}),
    "ConvTranspose more": (
        "ConvTranspose", draw(1, 2, 4), (draw(2, 3, 3),), {"strides": [2], "output_padding": [1]},
    ),
    "MaxPool": (IMAGE, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    "AveragePool": (IMAGE, {"kernel_shape": [2, 2], "strides": [2, 1]}),
    "GlobalAveragePool": (IMAGE,),
    "Reshape": (X, (ints(0, -1),)),
    "Transpose": (X, {"perm": [2, 0, 1]}),
    "Transpose all": ("Transpose", X),
    "Squeeze": (Y, (ints(-1),)),
    "Squeeze all": ("Squeeze", draw(1, 3, 1)),
    "Unsqueeze": (X, (ints(0, -1),)),
    "Concat": (X, X + 1, {"axis": -2}),
    "Slice": (X, (ints(-1, 0),), (ints(-9, 9),), (ints(1, -1),), (ints(-1, 2),)),
    "Slice plain": ("Slice", X, (ints(1),), (ints(2**63 - 1),), (ints(2),)),
    "Split": (X, (ints(1, 3),), {"axis": 2, "n_out": 2}),
    "Split parts": ("Split", X, {"axis": 1, "num_outputs": 2, "n_out": 2}),
    "Pad": (X, (ints(1, 0, 0, 2, 0, 1),), (np.float32(3),)),
    "Expand": (Y, (ints(2, 1, 4),)),
    "Tile": (Y, (ints(2, 3),)),
    "Gather": (X, ROW, {"axis": 1}),
    "Gather rows": ("Gather", (draw(9, 4),), np.array([[0, -9], [8, 3]])),
    "GatherND": (X, ints([1, 2], [0, 1]).reshape(2, 2)),
    "Constant": ({"value": numpy_helper.from_array(X)},),
    "Constant numbers": ("Constant", {"value_ints": [3, 4]}),
    "ConstantOfShape": ((ints(2, 3),), {"value": numpy_helper.from_array(np.array([7], np.int32))}),
    "Shape part": ("Shape", X, {"start": 1}),
    "Range": ((np.float32(1),), (np.float32(4),), (np.float32(0.5),)),
    "DequantizeLinear": (BYTES, (POSITIVE[0, 0],), (BYTES[0],), {"axis": 1}),
    "DequantizeLinear one": ("DequantizeLinear", BYTES.astype(np.int8), (np.float32(0.1),)),
    "QuantizeLinear": (X, (np.float32(0.02),), (np.int8(3),)),
    "QuantizeLinear unsigned": ("QuantizeLinear", X, (np.float32(0.02),)),
    "DynamicQuantizeLinear": (X, {"n_out": 3}),
    "Resize": (IMAGE, None, None, (ints(2, 4, 5, 12),), {"mode": "cubic"}),
    "Resize linear": ("Resize", IMAGE, None, (np.array([1, 1, 2, 0.5], np.float32),), {"mode": "linear"}),
    "Resize aligned": (
        "Resize", IMAGE, None, None, (ints(2, 4, 9, 6),),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    "Resize nearest": (
        "Resize", IMAGE, None, None, (ints(2, 4, 14, 4),),
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hw_onnx_operator_computes_what_onnx_computes(case):
    op, *inputs = CASES[case] if isinstance(CASES[case][0], str) else (case, *CASES[case])
    attributes = inputs.pop() if inputs and isinstance(inputs[-1], dict) else {}
    raw, feed = model(op, inputs, **attributes)
    program, weights = hw.from_onnx(raw)
    assert hw.Program.from_json(program.to_json()) == program
    got, _ = hw.run_program(program, (*feed.values(), weights))
    want = ReferenceEvaluator(raw).run(None, feed)
    for g, w in zip(got if isinstance(got, tuple) else (got,), want, strict=True):
        w = np.asarray(w)
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        if w.dtype.kind == "f":
            # float32 on both sides: a product of at most 36 terms, or some dozen functions, each rounded once
            np.testing.assert_allclose(g, w, rtol=0, atol=2 * 36 * EPS * max(1, np.abs(w).max()))
        else:
            np.testing.assert_array_equal(g, w)


def test_hw_onnx_every_rule_is_tried():
    assert {CASES[c][0] if isinstance(CASES[c][0], str) else c for c in CASES} == set(NODES)


def test_hw_onnx_bookkeeping_leaves_no_op_and_scopes_are_those_of_the_file():
    """A reshape whose target is computed from a shape, as exporters write it."""
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"], axis=0),
            node("Unsqueeze", ["n", "axes"], ["n1"]),
            node("Concat", ["n1", "rest"], ["to"], axis=0),
            node("Reshape", ["x", "to"], ["flat"], name="/a/b/Reshape"),
            node("MatMul", ["flat", "w"], ["y"], name="/a/b/MatMul"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 4])],
        [helper.make_empty_tensor_value_info("y")],
        [
            numpy_helper.from_array(a, n)
            for n, a in {"zero": np.int64(0), "axes": ints(0), "rest": ints(-1), "w": draw(12, 5)}.items()
        ],
    )
    raw = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    program, weights = hw.from_onnx(raw, sizes={"batch": 2})
    assert [op.prim for op in program.ops] == ["reshape", "dot_general"]
    assert {op.scope for op in program.ops} == {"a/b"}
    assert hw.count(program).macs == 2 * 12 * 5
    assert (program.name, program.arguments, list(weights)) == ("net", ("x", "weights"), ["w"])
    assert program.bytes("weight") == 4 * 12 * 5
    assert hw.estimate(program, hw.h200()).seconds > 0


def test_hw_onnx_bad_files_and_nodes_are_named(tmp_path):
    raw, _ = model("Add", (X, Y), open_axis="batch")
    smaller, hanging = (
        (IMAGE, None, None, (ints(2, 4, 5, 5),)),
        {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]},
    )
    refused = {
        "Einsum": (model("Einsum", (X, X), equation="abc,abc->a"), "no rule for the operator ai.onnx:Einsum"),
        "Softmax": (model("Softmax", (X,), axis=1, opset=11), "flattened axes"),
        "Resize": (model("Resize", smaller, mode="cubic", antialias=1), "antialias"),
        "ConvTranspose": (model("ConvTranspose", (IMAGE, (draw(4, 3, 3, 3),)), group=2), "in groups"),
        "AveragePool": (model("AveragePool", (IMAGE,), **hanging), "over the edge"),
        "Pad": (model("Pad", (X, (ints(1, 0, 0, 0, 0, 0),)), mode="reflect"), "padding by reflect"),
        "BatchNormalization": (
            model("BatchNormalization", (IMAGE, *[(POSITIVE[0, 0],)] * 4), training_mode=1), "in training",
        ),
        "GatherND": (model("GatherND", (X, ints([[0], [1]])[0]), batch_dims=1), "batch axes"),
    }  # fmt: skip
    for op, ((bytes_, _), words) in refused.items():
        with pytest.raises(hw.UnsupportedPrimitive, match=f"{op} /part/{op}.*{words}"):
            hw.from_onnx(bytes_)
    with pytest.raises(hw.DynamicShape, match="the new shape depends on data"):
        hw.from_onnx(model("Reshape", (X, ints(6, 4)))[0])
    with pytest.raises(ValueError, match="sizes needs the length of 'batch'"):
        hw.from_onnx(raw)
    with pytest.raises(ValueError, match="sizes names 'bach', but the open axes are batch"):
        hw.from_onnx(raw, sizes={"batch": 2, "bach": 1})
    with pytest.raises(ValueError, match="no readable ONNX model"):
        hw.from_onnx(b"not a model")
    (tmp_path / "cut.onnx").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cut\.onnx"):
        hw.from_onnx(tmp_path / "cut.onnx")
    away = onnx.load_from_string(model("MatMul", (X, (draw(4, 5),)))[0])
    onnx.external_data_helper.set_external_data(away.graph.initializer[0], "../elsewhere")
    with pytest.raises(ValueError, match="lie in another file"):
        hw.from_onnx(away.SerializeToString())


@pytest.mark.model
def test_hw_onnx_a_trained_encoder_runs_as_its_file_says():
    """The int8 MiniLM: six layers of 384 on 2 x 9 tokens, half of one row padded."""
    path = cached("minilm_int8")
    program, weights = hw.from_onnx(path, sizes={"batch": 2, "sequence": 9})
    ids = np.random.default_rng(0).integers(5, 1000, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, 5:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    got, _ = hw.run_program(program, (*(feed[n] for n in program.arguments[:-1]), weights))
    want = ReferenceEvaluator(str(path)).run(None, feed)[0]
    # six layers of products of up to 1,536 terms in float32; errors add like their square root
    np.testing.assert_allclose(got, want, rtol=0, atol=6 * np.sqrt(1536) * EPS * np.abs(want).max())
    layer = 18 * 12 * 384**2 + 2 * 2 * 9**2 * 384  # projections and MLP, then scores and values
    assert hw.count(program).macs == 6 * layer


@pytest.mark.model
def test_hw_onnx_a_vision_transformer_is_counted_by_scope():
    """DINOv2 ViT-S with a decoder: the 12 layers' products on 257 tokens, exactly."""
    program, _ = hw.from_onnx(cached("dinov2"), sizes={"batch_size": 1})
    macs = {}
    for op in program.ops:
        if op.kind in ("matmul", "conv") and (found := re.match(r"backbone/encoder/(layer\.\d+)", op.scope)):
            macs[found[1]] = macs.get(found[1], 0) + op.dims.macs
    assert set(macs.values()) == {257 * 12 * 384**2 + 2 * 257**2 * 384}
    assert len(macs) == 12
