"""The Triton kernels, run by Triton's interpreter and as PTX, and what launches them."""

from __future__ import annotations

from ..fault import Fault

KERNELS = "cacr_kernels/backends/triton/kernels/"
HOST = "cacr_kernels/backends/triton/"
OPERATORS = "tests/triton/interpreted/test_operators.py -k 'not opcheck'"
LOSSES = "tests/triton/interpreted/test_losses.py"
FLOAT64 = "tests/triton/interpreted/test_operators.py -k float64"
RBF = "tests/triton/interpreted/test_losses.py -k 'promise and rbf'"
DETACHED_KEYS = "tests/triton/interpreted/test_operators.py -k detached_keys"
TUNING = "tests/triton/test_tuning.py"
PTX = "tests/triton/test_ptx.py -k 'numbers or planted or found'"

FAULTS = (
    Fault(
        "triton-moved-top",
        KERNELS + "statistics.py",
        text="sum_ez = (sum_ez + shift * sum_e) * rescale + tl.sum(e * z, 1)",
        replacement="sum_ez = sum_ez * rescale + tl.sum(e * z, 1)",
        why="the mean forgets how far a later tile moved the maximum",
        tests=FLOAT64,
    ),
    Fault(
        "triton-sum-does-not-shrink",
        KERNELS + "statistics.py",
        text="sum_e = sum_e * rescale + tl.sum(e, 1)",
        replacement="sum_e = sum_e + tl.sum(e, 1)",
        why="weights of earlier tiles count too much once the maximum moves",
        tests=FLOAT64,
    ),
    Fault(
        "triton-shift-of-the-second-softmax",
        KERNELS + "statistics.py",
        text="add_tile(second.slope * z, second.slope * shift, sum_e1, sum_ez1)",
        replacement="add_tile(second.slope * z, shift, sum_e1, sum_ez1)",
        why="rbf: the second softmax moves by the shift of the first",
        tests=(RBF, OPERATORS),
    ),
    Fault(
        "triton-merged-ratio",
        KERNELS + "merge.py",
        text="split_max.to(tl.float64) - base) * ratio",
        replacement="split_max.to(tl.float64) - base)",
        why="rbf with splits of the keys: the second softmax shrinks like the first",
        tests=(RBF, OPERATORS),
    ),
    Fault(
        "triton-merged-empty-rows",
        KERNELS + "merge.py",
        text="empty = (sum_e == 0) & (sum_ez == 0) & (row_max == -mask_bias)",
        replacement="empty = (sum_e == 0) & (sum_ez == 0)",
        why="a row of costs that are not finite passes for empty",
        tests=("tests/triton/interpreted/test_operators.py -k 'bad or empty'", LOSSES),
    ),
    Fault(
        "triton-detached-lse",
        KERNELS + "coefficients.py",
        text="    if not DETACH:\n        constant +=",
        replacement="    if True:\n        constant +=",
        why="weights that are constants are differentiated",
        tests=OPERATORS,
    ),
    Fault(
        "triton-bound-without-the-largest-weight",
        KERNELS + "coefficients.py",
        text="bound = largest * (",
        replacement="bound = 1e-8 * largest * (",
        why="coefficients of float16 overflow",
        tests=("tests/triton/interpreted/test_operators.py -k dtypes", LOSSES),
    ),
    Fault(
        "triton-moment-of-a-split",
        KERNELS + "gradient.py",
        text="out = moment + split * stride + p * queries + rows",
        replacement="out = moment + p * queries + rows",
        why="splits of the keys overwrite each other's share of the temperature gradient",
        tests=(LOSSES, OPERATORS),
    ),
    Fault(
        "triton-kahan-the-wrong-way",
        KERNELS + "gradient.py",
        text="return new, (new - total) - y",
        replacement="return new, y - (new - total)",
        why="what rounding took is taken twice",
        tests=(LOSSES, OPERATORS),
    ),
    Fault(
        "triton-scale-of-float16",
        KERNELS + "gradient.py",
        text="total = total / scale",
        replacement="total = total * scale",
        why="gradients of float16 are scaled twice",
        tests="tests/triton/interpreted/test_operators.py -k dtypes",
    ),
    Fault(
        "triton-scale-of-the-second-softmax",
        KERNELS + "gradient.py",
        text="b = coefficient(row1 + B * stride, queries, AS_QUERY) * rows.scale",
        replacement="b = coefficient(row1 + B * stride, queries, AS_QUERY)",
        why="float16, two softmaxes: one coefficient is not scaled",
        tests=("tests/triton/interpreted/test_operators.py -k dtypes", LOSSES),
    ),
    Fault(
        "triton-first-split-of-the-variance",
        KERNELS + "total.py",
        text="for j in range(SPLITS):",
        replacement="for j in range(1):",
        why="the temperature gradient is that of the first split",
        tests=(OPERATORS, LOSSES),
    ),
    Fault(
        "triton-rbf-pairs",
        KERNELS + "loss.py",
        text="grad_neg = beta * grad_neg / P",
        replacement="grad_neg = beta * grad_neg",
        why="rbf: the temperature gradient is summed over the pairs",
        tests=RBF,
    ),
    Fault(
        "triton-detached-spread",
        KERNELS + "detached_keys.py",
        text="spread = (spread + shift[:, None] * mean) * rescale[:, None]",
        replacement="spread = spread * rescale[:, None]",
        why="queue: gradient with differentiated weights once the maximum moves",
        tests=DETACHED_KEYS,
    ),
    Fault(
        "triton-negative-tau-pos",
        KERNELS + "aligned.py",
        text="(tau_pos * (wide - top) > 0)",
        replacement="(wide > top)",
        why="a negative temperature given as a tensor: weights overflow",
        tests=(LOSSES, "tests/losses/test_functional_bad_numbers.py -k negative"),
    ),
    Fault(
        "triton-low-piece",
        KERNELS + "tile.py",
        text="        acc = tl.dot(low.to(tl.bfloat16), y, acc, out_dtype=acc.dtype)\n",
        replacement="",
        why="gradients of bfloat16 keep 16 of 24 bits of their coefficients",
        tests=PTX,
    ),
    Fault(
        "triton-near",
        KERNELS + "tile.py",
        text="NEAR = tl.constexpr(0.125)",
        replacement="NEAR = tl.constexpr(1e-6)",
        why="close positives cancel",
        tests=("tests/triton/interpreted/test_operators.py -k near", LOSSES),
    ),
    Fault(
        "triton-halves-of-a-number",
        HOST + "cacr.py",
        text="return high, low",
        replacement="return low, high",
        why="numbers given to a loss on a GPU have their halves exchanged",
        tests="tests/triton",
    ),
    Fault(
        "triton-float32-references",
        HOST + "contrast.py",
        text="(readable(given.k), given.k_id)",
        replacement="(given.k.contiguous(), given.k_id)",
        why="queries of bfloat16 with references: the interpreter multiplies two types",
        tests=(LOSSES, OPERATORS),
    ),
    Fault(
        "triton-cancelling",
        HOST + "pairs.py",
        text="self.kinds[1] in (self.kinds[0], SHARED_SET)",
        replacement="self.kinds[1] == self.kinds[0]",
        why="the fused rbf loss does not form the difference of its softmaxes",
        tests=RBF,
    ),
    Fault(
        "triton-source-of-a-choice",
        HOST + "tuning.py",
        text="source.update(path.read_bytes())",
        replacement="source.update(path.name.encode())",
        why="a changed kernel takes over choices of the old one",
        tests=TUNING,
    ),
    Fault(
        "triton-mean-of-times",
        HOST + "tuning.py",
        text='do_bench(call, return_mode="median")',
        replacement='do_bench(call, return_mode="mean")',
        why="one slow call decides which tile is taken",
        tests=TUNING,
    ),
    Fault(
        "triton-class-of-features",
        HOST + "table.py",
        text="(c for c in CLASSES if c >= D)",
        replacement="(c for c in CLASSES if c > D)",
        why="64 features take the tiles of 128",
        tests=("tests/triton/test_interpreter.py", "tests/triton/test_codegen.py"),
    ),
)
