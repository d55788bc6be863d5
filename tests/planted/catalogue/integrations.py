"""``tau_plus`` and the functions of the published scripts: ``cacr_kernels/integrations/cacr_ssl.py``."""

from __future__ import annotations

from ..fault import Fault

FILE = "cacr_kernels/integrations/cacr_ssl.py"
LOSSES = "cacr_kernels/functional.py"
TESTS = "tests/losses/test_published_options.py"

FAULTS = (
    Fault(
        "integrations-debiasing-adds",
        LOSSES,
        text="* (-tau_plus / (1 - tau_plus))",
        replacement="* (tau_plus / (1 - tau_plus))",
        why="tau_plus pushes views of one instance together where it should pull them apart",
        tests=TESTS,
    ),
    Fault(
        "integrations-debiasing-scales-nothing",
        LOSSES,
        text="given_numbers = tau_pos, tau_neg, alpha, beta / (1 - tau_plus), rbf_scale",
        replacement="given_numbers = tau_pos, tau_neg, alpha, beta, rbf_scale",
        why="the fused loss with tau_plus is not divided by 1 - tau_plus",
        tests=TESTS,
    ),
    Fault(
        "integrations-parts-without-debiasing",
        LOSSES,
        text="        repulsion = repulsion + extra.detach().to(repulsion.dtype)\n",
        replacement="        pass\n",
        why="the parts that are logged do not add up to the loss",
        tests=TESTS,
    ),
    Fault(
        "integrations-choice-of-the-other",
        FILE,
        text='tau = 0.0 if _choice(choice) in ("none", "without_w1") else tau_pos',
        replacement='tau = 0.0 if _choice(choice) in ("none", "without_w2") else tau_pos',
        why='choice="without_w1" weighs the positives all the same',
        tests=TESTS,
    ),
    Fault(
        "integrations-debiased-where-uniform",
        FILE,
        text="(0.0, 0.0) if uniform",
        replacement="(0.0, tau_plus if with_debiased else 0.0) if uniform",
        why='choice="none" is debiased, which the published function is not',
        tests=TESTS,
    ),
    Fault(
        "integrations-weights-of-the-loss",
        FILE,
        text="return (tau_pos * cost).softmax(1)",
        replacement="return (tau * cost).softmax(1)",
        why='choice="none" returns uniform weights, where the published function returns those of tau_pos',
        tests=TESTS,
    ),
    Fault(
        "integrations-mean-for-the-sum",
        FILE,
        text='cost="sqeuclidean", reduction="sum")',
        replacement='cost="sqeuclidean")',
        why="cacr_euclideanloss is a mean, the published one a sum",
        tests=TESTS,
    ),
    Fault(
        "integrations-queue-of-columns",
        FILE,
        text="list(k_list), queue.T",
        replacement="list(k_list), queue.T.flip(1)",
        why="moco_losses compares with a queue whose features are in another order",
        tests=TESTS,
    ),
    Fault(
        "integrations-negatives-of-the-batch",
        FILE,
        text='"in_batch": unif_intra_batch',
        replacement='"in_batch": True',
        why="unif_intra_batch=False of moco_losses is forgotten",
        tests=TESTS,
    ),
    Fault(
        "integrations-weights-of-combine",
        FILE,
        text="return loss1_w * self.loss1 + loss2_w * self.loss2",
        replacement="return loss1_w * (self.loss1 + self.loss2)",
        why="combine() forgets the weight of the repulsion",
        tests=TESTS,
    ),
)
