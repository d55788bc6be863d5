"""The self-check of "auto": what it asks, what it lets pass, and what it keeps for later processes."""

from __future__ import annotations

from ..fault import Fault

CHECK = "cacr_kernels/backends/self_check.py"
TESTS = "tests/device/test_self_check.py"
GPU = "tests/device/test_gpu_self_check.py"

FAULTS = (
    Fault(
        "selfcheck-rows-of-the-user-alone",
        CHECK,
        text="if (wrong := _check(subject, [], features)) is not None:",
        replacement="if (wrong := _check(subject, rows, features)) is not None:",
        why="a first batch of zeros or NaN hides every fault of a kernel, and the good verdict is kept",
        tests=f"{TESTS} -k hide_nothing",
    ),
    Fault(
        "selfcheck-random-rows-alone",
        CHECK,
        text="return _check(subject, rows) if rows else None",
        replacement="return None",
        why="a kernel that is wrong for the user's sizes alone is trusted",
        tests=f"{TESTS} -k rows_of_the_user",
    ),
    Fault(
        "selfcheck-few-features-alone",
        CHECK,
        text="in OF_HALF_TYPES if subject.dtype.itemsize == 2 else FEATURES_OF_RANDOM:",
        replacement="in FEATURES_OF_RANDOM:",
        why="half types of many features have kernels that compiled code would take unchecked",
        tests=f"{TESTS} -k many_features",
    ),
    Fault(
        "selfcheck-allows-too-much",
        CHECK,
        text="allowed = TWICE * (FACTOR * ratio * eager + EPSILONS * eps)",
        replacement="allowed = TWICE * (FACTOR * ratio * eager + EPSILONS * eps**0.5)",
        why="errors of a percent pass",
        tests=f"{TESTS} -k bad_backend",
    ),
    Fault(
        "selfcheck-half-types-allow-too-much",
        CHECK,
        text="allowed += TWICE * torch.finfo(subject.dtype).eps",
        replacement="allowed += TWICE * torch.finfo(subject.dtype).eps ** 0.5",
        why="gradients of half types that are off by a tenth pass",
        tests=f"{TESTS} -k half_types",
    ),
    Fault(
        "selfcheck-gradients-not-looked-at",
        CHECK,
        text='return {"value": value.detach(), **{n: x.detach() for n, x in others.items()}, **named}',
        replacement='return {"value": value.detach(), **{n: x.detach() for n, x in others.items()}}',
        why="a kernel with wrong gradients is trusted",
        tests=f"{TESTS} -k 'bad_backend and backward'",
    ),
    Fault(
        "selfcheck-number-where-nan-should-be",
        CHECK,
        text="if (exact.isnan() & yardstick[name].isnan() & ~found[name].isnan()).any():",
        replacement="if False:",
        why="a kernel that hides the NaN of a diverged encoder is trusted",
        tests=f"{TESTS} -k hides_nan",
    ),
    Fault(
        "selfcheck-keeps-bad-verdicts",
        CHECK,
        text="    if wrong is None:\n        keep(backend, subject)\n        return True\n",
        replacement="    keep(backend, subject)\n    if wrong is None:\n        return True\n",
        why="later processes trust what this one has found to be wrong",
        tests=f"{TESTS} -k bad_verdicts",
    ),
    Fault(
        "selfcheck-verdict-of-any-torch",
        CHECK,
        text='        "torch": torch.__version__,\n',
        replacement="",
        why="a good verdict outlives the torch it was found under",
        tests=f"{TESTS} -k good_verdicts",
    ),
    Fault(
        "selfcheck-one-type-for-all",
        CHECK,
        text="subject = Subject(backend.name, operator, dtype, products, raw, device)",
        replacement="subject = Subject(backend.name, operator, torch.float32, products, raw, device)",
        why="kernels of other types are trusted because those of float32 are right",
        tests=f"{TESTS} -k each_operator_and_type",
    ),
    Fault(
        "selfcheck-one-device-for-all",
        CHECK,
        text="subject = Subject(backend.name, operator, dtype, products, raw, device)",
        replacement="subject = Subject(backend.name, operator, dtype, products, raw, torch.device(device.type, 0))",
        why="the second GPU is trusted because the first one is right",
        tests=f"{GPU} -k each_device",
    ),
    Fault(
        "selfcheck-named-backend-is-checked",
        "cacr_kernels/steps.py",
        text="if calls is not None and chosen.check_first is not None and is_auto(backend):",
        replacement="if calls is not None and chosen.check_first is not None:",
        why="a backend that was named is replaced",
        tests=f"{TESTS} -k named_backend",
    ),
    Fault(
        "selfcheck-while-a-graph-is-captured",
        CHECK,
        text='if os.environ.get(VARIABLE, "") == "0" or _capturing(device):',
        replacement='if os.environ.get(VARIABLE, "") == "0":',
        why="the check waits for the device, which ends a capture",
        tests=f"{GPU} -k captured",
    ),
    Fault(
        "selfcheck-not-on-the-stream-of-the-caller",
        CHECK,
        text="                    stack.enter_context(torch.cuda.stream(stream))\n",
        replacement="",
        why="the rows are read before another stream has made them, and a good kernel is left out or a bad one kept",
        tests=f"{GPU} -k another_stream",
    ),
    Fault(
        "selfcheck-lost-device-is-a-difference",
        CHECK,
        text="    except Exception as error:  # of a compiler, a launch, anything that a kernel may do\n"
        "        _raise_if_lost(subject, error)\n",
        replacement="    except Exception as error:  # of a compiler, a launch, anything that a kernel may do\n",
        why="after an illegal access the process goes on with a device that it has lost",
        tests=f"{GPU} -k lost",
    ),
    Fault(
        "selfcheck-no-memory-is-a-difference",
        CHECK,
        text="        raise UndecidedError(str(error)[:500]) from error\n"
        "    except Exception as error:  # of a compiler",
        replacement="        return str(error)[:500]\n    except Exception as error:  # of a compiler",
        why="a good backend is left out because the memory was full at the first call",
        tests=f"{TESTS} -k cannot_be_made",
    ),
    Fault(
        "selfcheck-compilers-trust",
        CHECK,
        text="return _passes(named(name), operators, [], device, dtype, raw)",
        replacement="return True",
        why="compiled code takes kernels that nobody has checked",
        tests=f"{TESTS} -k compiled",
    ),
    Fault(
        "selfcheck-warns-again-and-again",
        CHECK,
        text="    _warned.add(at)\n",
        replacement="",
        why="one bad device fills the log with a warning for every operator and type",
        tests=f"{TESTS} -k one_warning",
    ),
    Fault(
        "selfcheck-rank-not-named",
        CHECK,
        text='return f"{subject.device} of rank {dist.get_rank()} of {dist.get_world_size()}"',
        replacement="return str(subject.device)",
        why="in a log of many processes nobody knows whose device is wrong",
        tests="tests/distributed/test_self_check_of_ranks.py",
    ),
)
