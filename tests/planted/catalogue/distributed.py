"""What the losses do with other processes: ``cacr_kernels/distributed.py`` and the counts of all ranks."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/distributed.py"
TESTS = "tests/distributed/test_gathered.py::"
CASES = TESTS + "test_ranks_compute_what_one_process_does[3]"

FAULTS = (
    Fault(
        "distributed-gather-without-gradient",
        FILE,
        text="return Scatter.apply(grad, ctx.group), None, None",
        replacement="return torch.zeros_like(grad[0]), None, None",
        why="keys get no gradient from any rank",
        tests=CASES,
    ),
    Fault(
        "distributed-gradient-of-own-rank",
        FILE,
        text="return Scatter.apply(grad, ctx.group), None, None",
        replacement="return grad[0], None, None",
        why="keys get the gradient of their own rank alone",
        tests=CASES,
    ),
    Fault(
        "distributed-rank-off-by-one",
        FILE,
        text="return _all_gather(x[None], group).roll(-group.rank, 0)",
        replacement="return _all_gather(x[None], group).roll(-group.rank - 1, 0)",
        why="queries take the instances of the next rank for themselves",
        tests=CASES,
    ),
    Fault(
        "distributed-order-of-reduce-scatter",
        FILE,
        text="rows = x.roll(group.rank, 0).contiguous()",
        replacement="rows = x.roll(-group.rank, 0).contiguous()",
        why="gradients go to other ranks than those the keys came from",
        tests=CASES,
    ),
    Fault(
        "distributed-rbf-mean-of-own-rank",
        FILE,
        text="return of_ranks[:, -1].mean(), of_ranks[:, :-1].logsumexp(0) - math.log(group.size)",
        replacement="return of_ranks[:, -1].mean(), log_mean",
        why="under rbf the log of the mean is that of the queries of this rank",
        tests=CASES,
    ),
    Fault(
        "distributed-queries-with-a-set",
        FILE,
        text="    return _torch_private.all_reduce(counts.contiguous(), group.name)\n",
        replacement="    return counts * group.size\n",
        why="supervised: queries that have a positive are counted on this rank alone",
        tests=TESTS + "test_check[labels_of_one_rank-2]",
    ),
    Fault(
        "distributed-number-of-queries",
        "cacr_kernels/losses.py",
        text="factor = value.shape[1] * ranks.size / nonempty",
        replacement="factor = value.shape[1] / nonempty",
        why="supervised: a mean over W times as many queries",
        tests=CASES,
    ),
    Fault(
        "distributed-temperatures-of-own-rank",
        FILE,
        text="    if group is None or not tensors:",
        replacement="    if True:",
        why="outside DDP temperatures drift apart",
        tests=(CASES, TESTS + "test_check[outside_ddp-3]"),
    ),
    Fault(
        "distributed-order-in-the-queue",
        FILE,
        text="return stacked(x, group).movedim(0, -3).flatten(-3, -2)",
        replacement="return stacked(x, group).flatten(0, 1)",
        why="the queue holds the keys rank by rank, not view by view",
        tests=TESTS + "test_check[inside_ddp-3]",
    ),
    Fault(
        "distributed-last-view",
        "cacr_kernels/modules.py",
        text='keys if self.enqueue == "all" else keys[-1:]',
        replacement='keys if self.enqueue == "all" else keys[:1]',
        why="the first view enters the queue instead of the last",
        tests=TESTS + "test_check[the_last_view_enters_the_queue-2]",
    ),
    Fault(
        "distributed-sizes-go-unnoticed",
        FILE,
        text="            if first != other:",
        replacement="            if first[:2] != other[:2]:",
        why="ranks with batches of different sizes crash or compute garbage",
        tests=TESTS + "test_check[sizes_that_differ-2]",
    ),
    Fault(
        "distributed-half-sums",
        FILE,
        text="return Scatter.apply(grad, ctx.group), None, None",
        replacement="return Scatter.apply(grad.bfloat16(), ctx.group).to(grad), None, None",
        why="gradients are added in a half type",
        tests=TESTS + "test_check[half_types_travel_as_they_are-2]",
    ),
    Fault(
        "distributed-group-of-all",
        FILE,
        text="group = distributed.group.WORLD if process_group is None else process_group",
        replacement="group = distributed.group.WORLD",
        why="a group of some ranks is not looked at",
        tests=TESTS + "test_check[a_group_of_some_ranks-3]",
    ),
    Fault(
        "distributed-temperatures-are-added",
        FILE,
        text="return _torch_private.all_reduce(x.contiguous(), group.name) / group.size",
        replacement="return _torch_private.all_reduce(x.contiguous(), group.name)",
        why="temperatures get as many times their gradient as there are ranks",
        tests=TESTS + "test_check[trained_outside_fully_shard-2]",
    ),
    Fault(
        "distributed-triton-gradient-of-own-rank",
        FILE,
        text="return Scatter.apply(grad, ctx.group), None, None",
        replacement="return grad[0] * ctx.group.size, None, None",
        why="on the Triton backend, too, keys get the gradient of their own rank",
        tests="tests/triton/interpreted/test_processes.py",
    ),
)
