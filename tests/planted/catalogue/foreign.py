"""Slips by somebody who had seen the code and none of the tests: they measure the suite from outside.

So ``tests`` names whole folders, the same for all faults of a layer, and every ``why`` an input that shows the fault.
"""

from __future__ import annotations

from functools import partial

from ..fault import Fault

Foreign = partial(Fault, foreign=True)

PLANNER, KERNELS, COMMON, CUDA = "csrc/cpu/planner/", "csrc/cpu/kernels/", "csrc/common/", "csrc/cuda/"
PACKAGE, SUITE = "cacr_kernels/", "benchmarks/suite/"
TRITON = PACKAGE + "backends/triton/"

OF_CPU = ("tests/operators", "tests/losses", "tests/cpu")
OF_CUDA = ("tests/cuda", "tests/cuda_emulation")
OF_TRITON = ("tests/triton/interpreted", "tests/triton")
OF_PYTHON = ("tests/losses", "tests/operators", "tests/package", "tests/cpu")
OF_TOOLS = ("tests/package", "tests/benchmarks")

CPU_FAULTS = (
    Foreign(
        "foreign-cpu-bound-without-repulsion",
        PLANNER + "engine.h",
        text="tau = std::max(tau, std::abs(p.tau[s]));",
        replacement="tau = std::max(tau, p.tau[s]);",
        why="negative temperatures count as 0 in the bound: float32 unit vectors at tau_neg=200 leave the range of 2^x",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-merge-of-two-threads",
        KERNELS + "symmetric.h",
        text="const Panel<T> other = load_panel(from.sum_d + i) * m1.scale;",
        replacement="const Panel<T> other = load_panel(from.sum_d + i) * m0.scale;",
        why="what a second thread found is scaled as the first: pooled [2, 500, 16] on two threads, not on one",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-close-positives",
        KERNELS + "block.h",
        text="cost > T(0.5) * (norm - splat_panel(2 * bias[j]))",
        replacement="cost > T(0.5) * (norm + splat_panel(2 * bias[j]))",
        why="costs of close positives cancel: supervised float32 unit vectors of a class that are 1e-3 apart",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-turned-once",
        KERNELS + "symmetric.h",
        text="if (turned < 0 || g.positive[s] != g.positive[turned]) turn(",
        replacement="if (turned < 0) turn(",
        why="the negatives of keys lack the norms, which unit vectors hide: supervised, 300 embeddings of mixed length",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-range-of-last-lane",
        KERNELS + "weigh_tile.h",
        text="out.in_range &= least.v[h][l] >= kExp2Min<T>;",
        replacement="out.in_range = least.v[h][l] >= kExp2Min<T>;",
        why="the last lane decides for all: 5 queries (the last lane is none) against a queue, tau_neg=200, float32",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-second-moment-of-a-moved-top",
        KERNELS + "detached_keys.h",
        text="state.sum_dd[l] = (state.sum_dd[l] + m * (2 * ed + m * e)) * scale",
        replacement="state.sum_dd[l] = (state.sum_dd[l] + m * (ed + m * e)) * scale",
        why="derivative of tau_neg, weight_grad='full', queue of several tiles of 144 keys: the cross term counts once",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-mask-of-the-last-id",
        KERNELS + "detached_keys.h",
        text="(p.k_id[j] >= panel.low_id) & (p.k_id[j] <= panel.high_id)",
        replacement="(p.k_id[j] >= panel.low_id) & (p.k_id[j] < panel.high_id)",
        why="momentum sqeuclidean of one instance: its positive is among the negatives",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-one-sweep-of-unbounded-rbf",
        PLANNER + "loss.cpp",
        text="(!loss.rbf || (e.bounded && loss.rbf_scale >= 0))",
        replacement="(!loss.rbf || loss.rbf_scale >= 0)",
        why="rbf of embeddings 30 long: exp(lse_1 - lse_0) underflows and the gradient is NaN",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-alpha-of-tau-pos",
        PLANNER + "loss.cpp",
        text="result.grad_tau_pos = loss.alpha * sum_of(s.variance, rows) / double(rows);",
        replacement="result.grad_tau_pos = sum_of(s.variance, rows) / double(rows);",
        why="the derivative of a learnable tau_pos forgets alpha: three views, alpha=0.5",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-cpu-scale-of-the-last-features",
        KERNELS + "kernels.cpp",
        text="out[d] = t.accumulate ? out[d] + scale * sum : scale * sum;",
        replacement="out[d] = t.accumulate ? out[d] + sum : scale * sum;",
        why="rbf gradient of features beyond the last whole vector: D=5",
        tests=OF_CPU,
    ),
    Foreign(
        "foreign-common-temperature-that-is-nan",
        COMMON + "rows.h",
        text="r.empty = sum == 0 && sum_d == 0 && finite_tau;",
        replacement="r.empty = sum == 0 && sum_d == 0;",
        why="tau_neg=tensor(nan), in_batch=False: the queue looks empty, and the loss is a finite number",
        tests=(*OF_CPU, *OF_CUDA),
    ),
    Foreign(
        "foreign-common-ratio-of-divisors",
        COMMON + "rows.h",
        text="first.factor * second.divisor / (second.factor * first.divisor)",
        replacement="first.factor * first.divisor / (second.factor * second.divisor)",
        why="rbf gradient with CUDA, which keeps divisors: the ratio of the two sums is upside down, [2, 7, 5]",
        tests=(*OF_CPU, *OF_CUDA),
    ),
)

TRITON_FAULTS = (
    Foreign(
        "foreign-triton-column-without-a-query",
        TRITON + "kernels/gradient.py",
        text="queries, AS_QUERY, WHOLE, 2.0 * softmax.mask_bias)",
        replacement="queries, AS_QUERY, WHOLE)",
        why="inf times a coefficient of 0 at the end of a tile: supervised, 7 embeddings of length 10, gradient NaN",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-choice-of-another-version",
        TRITON + "tuning.py",
        text="about = key._asdict() | _versions()",
        replacement="about = key._asdict()",
        why="a tile that was timed with another Triton, or other kernels, is taken from the cache on disk",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-deterministic-autotuning",
        TRITON + "tuning.py",
        text="if recording(device) or torch.are_deterministic_algorithms_enabled():",
        replacement="if recording(device):",
        why="use_deterministic_algorithms(True) with CACR_AUTOTUNE=1: times decide about tiles, and so about bits",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-variance-of-frozen-queries",
        TRITON + "detached_keys.py",
        text="moments = (want_q or want_tau) and not detach_weights and not detach_value",
        replacement="moments = want_q and not detach_weights and not detach_value",
        why="queue loss, weight_grad='full', only tau_neg learnable: its variance is missing, the backward fails",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-halves-of-a-number",
        TRITON + "cacr.py",
        text="    return high, low\n",
        replacement="    return low, high\n",
        why="on a GPU temperatures and weights given as numbers change their halves: cacr_loss of anything",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-mean-over-pairs-under-rbf",
        TRITON + "kernels/loss.py",
        text="grad_neg = beta * grad_neg / P",
        replacement="grad_neg = beta * grad_neg",
        why="rbf, learnable tau_neg, three views: its derivative is three times too large (two views have one pair)",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-attraction-of-the-other-row",
        TRITON + "kernels/aligned.py",
        text="g += aligned_coefficient(c, tau, row_state + u * wide + rows,",
        replacement="g += aligned_coefficient(c, tau, row_state + v * wide + rows,",
        why="three views: the gradient takes the weight of the own row twice (of two views all weights are 1)",
        tests=OF_TRITON,
    ),
    Foreign(
        "foreign-triton-spread-of-splits",
        TRITON + "kernels/detached_keys.py",
        text="spread += (split_spread + shift[:, None] * split_mean) * rescale[:, None]",
        replacement="spread += split_spread * rescale[:, None]",
        why="weight_grad='full', 4 queries against 1000 keys: splits that do not hold the top give a wrong gradient",
        tests=OF_TRITON,
    ),
)

CUDA_FAULTS = (
    Foreign(
        "foreign-cuda-splits-of-a-second-launch",
        CUDA + "phases/sums.cuh",
        text="Acc sum = p.accumulate || side.splits == 1 ? *to : Acc(0);",
        replacement="Acc sum = side.splits == 1 ? *to : Acc(0);",
        why="contrast of more than 64 pairs of views, keys in splits: the gradients of the first launch are lost",
        tests=OF_CUDA,
    ),
    Foreign(
        "foreign-cuda-known-sum-of-every-split",
        CUDA + "phases/gradients.cuh",
        text="if (at.column == 0 && split == 0 && i < rows().rows)",
        replacement="if (at.column == 0 && i < rows().rows)",
        why="gradient of queries whose keys are in several splits, [2, 200, 16]: the sum of the row counts in each",
        tests=OF_CUDA,
    ),
    Foreign(
        "foreign-cuda-entropy-under-rbf",
        CUDA + "phases/sums.cuh",
        text="entropy += row_entropy(p.lse[i], number(p.tau[0]), p.value[i]);",
        replacement="entropy += row_entropy(p.lse[i], number(p.tau[1]), p.value[i]);",
        why="return_parts under rbf: the entropy of the repulsion takes the temperature of the second softmax",
        tests=OF_CUDA,
    ),
    Foreign(
        "foreign-cuda-variance-without-a-gradient",
        CUDA + "plan.cuh",
        text="units_of(p.want_q || p.want_variance ? p.q_views : 0, q_tiles,",
        replacement="units_of(p.want_q ? p.q_views : 0, q_tiles,",
        why="temperatures learnable, embeddings not: nobody writes the variances that the derivative adds up",
        tests=OF_CUDA,
    ),
    Foreign(
        "foreign-cuda-keys-off-16-bytes",
        CUDA + "operators.cuh",
        text="at_16(p.q) && at_16(p.k);",
        replacement="at_16(p.q);",
        why="keys in buffer[1:].view(M, 64) are read in vectors of 16 bytes that they are not aligned to",
        tests=OF_CUDA,
    ),
    Foreign(
        "foreign-cuda-self-of-the-second-row",
        CUDA + "tile/similarities.cuh",
        text="if (tag.key == row[h].key ||",
        replacement="if (tag.key == row[0].key ||",
        why="supervised, 9 embeddings of one class: the ninth is its own positive",
        tests=OF_CUDA,
    ),
)

PYTHON_FAULTS = (
    Foreign(
        "foreign-python-mixed-precision-of-the-queue",
        PACKAGE + "steps.py",
        text="tensors[0].dtype if as_is else arithmetic_dtype(*tensors)\n",
        replacement="tensors[0].dtype if as_is else arithmetic_dtype(tensors[0])\n",
        why="float32 queries with a float64 queue: the loss is float32, float64 is promised",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-last-key-offset",
        PACKAGE + "functional.py",
        text='checks.integer("key_offset", key_offset, 0, k.shape[0] - q.shape[1])',
        replacement='checks.integer("key_offset", key_offset, 0, k.shape[0] - 1)',
        why="key_offset=M - 1 is not refused any more: all queries get the last key as their positive",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-three-dtypes",
        PACKAGE + "checks.py",
        text="dtype = torch.promote_types(dtype, z.dtype)",
        replacement="dtype = torch.promote_types(parts[0].dtype, z.dtype)",
        why="views in float16, float64 and float32: the float64 one is rounded, the loss is float32",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-entropy-over-empty-sets",
        PACKAGE + "reference.py",
        text="return rows.sum() / nonempty.sum().clamp(min=1)",
        replacement="return rows.mean()",
        why="supervised, return_parts, a class of one: queries without a positive count in the mean entropy",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-counter-that-stays",
        PACKAGE + "ring.py",
        text="    count += waiting\n",
        replacement="    count.add_(waiting).clamp_(max=size)\n",
        why="queue_size=8, 4 keys a step: once it is full, every step overwrites the newest four, the oldest stay",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-keys-of-a-validation",
        PACKAGE + "modules.py",
        text="wanted = self.training and torch.is_grad_enabled() if update_queue is None else update_queue",
        replacement="wanted = self.training if update_queue is None else update_queue",
        why="a forward under no_grad in training mode puts its keys into the queue",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-gradient-that-is-still-needed",
        PACKAGE + "operators/cacr.py",
        text=' and g_loss.device.type == "cpu" and not _torch_private.backward_keeps_graph()',
        replacement=' and g_loss.device.type == "cpu"',
        why="autograd.grad(..., retain_graph=True) gives the saved gradient: scaled in place, the next one fails",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-self-in-the-second-block",
        PACKAGE + "operators/contrast.py",
        text="i = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=same.device)",
        replacement="i = torch.arange(rows.stop - rows.start, dtype=torch.int64, device=same.device)",
        why="backend torch, supervised, 2000 embeddings (two blocks): those of the second are their own positives",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-pooled-weights",
        PACKAGE + "weights.py",
        text="logit.masked_fill(some[:, None] % batch == keys % batch, -torch.inf)",
        replacement="logit.masked_fill(some[:, None] == keys, -torch.inf)",
        why="cacr_weights(pairing='pooled'): the other views of the instance are among its negatives",
        tests=OF_PYTHON,
    ),
    Foreign(
        "foreign-python-unsuited-before-slow",
        PACKAGE + "backends/table.py",
        text="        if unsuited is not None:\n            return unsuited\n",
        replacement="",
        why="'auto' on a GPU without Triton, float64 or a queue: plain PyTorch with a false warning, not 'cuda'",
        tests=OF_PYTHON,
    ),
)

TOOL_FAULTS = (
    Foreign(
        "foreign-tools-verify-fails-twice-only",
        PACKAGE + "verify.py",
        text="return not (wrong or wrong_gradients)",
        replacement="return not (wrong and wrong_gradients)",
        why="cacr-verify: a wrong loss whose gradcheck passes is reported as all within tolerance, exit status 0",
        tests=OF_TOOLS,
    ),
    Foreign(
        "foreign-tools-tolerance-of-half-types",
        PACKAGE + "testing.py",
        text="EPSILONS * torch.finfo(arithmetic_dtype(dtype)).eps",
        replacement="EPSILONS * torch.finfo(dtype).eps",
        why="bfloat16: 6 % off is within tolerance, for tests, cacr-verify and the gate of the benchmarks",
        tests=OF_TOOLS,
    ),
    Foreign(
        "foreign-tools-slower-machine",
        SUITE + "compare.py",
        text="return ratio_of_medians(_by_round(now, eager_now), _by_round(was, eager_then)), BY_EAGER",
        replacement="return ratio_of_medians(_by_round(now, eager_then), _by_round(was, eager_now)), BY_EAGER",
        why="--compare on a machine half as fast: all rows take twice as long, ours counts as slower, exit status 1",
        tests=OF_TOOLS,
    ),
    Foreign(
        "foreign-tools-peak-memory",
        SUITE + "processes.py",
        text='return _status("VmHWM")',
        replacement='return _status("VmRSS")',
        why="memory of a row: what is left after the call, not its peak; eager N x M arrays seem to cost nothing",
        tests=OF_TOOLS,
    ),
)

FAULTS = CPU_FAULTS + TRITON_FAULTS + CUDA_FAULTS + PYTHON_FAULTS + TOOL_FAULTS
