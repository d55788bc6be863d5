"""``make gpu-check``: is the package right on the GPU of this machine, and how fast? Nine minutes, without network.

steps.py       the steps in their order, with their time limits
supervise.py   runs one of them in processes of its own, and ends them
sessions.py    ends a process with all that it started
lines.py       what these processes write: a line of JSON at the start and the end of every task
report.py      makes the report from those lines, again and again while the steps run
child.py       the process of a step: its tasks one after the other
devices.py     which backends have a GPU, asked in the process of a step
reckoned.py    how long compiling takes, said at the beginning
compared.py    the times as one table
rule.py        whether "auto" chooses between the backends as these times say it should

environment.py, build.py, warm.py, smoke.py, times.py, verify.py, device_tests.py, cpu_threads.py are the steps;
problems.py is what smoke.py and warm.py compute, selection.py the plugin by which pytest takes the tests of a GPU.
"""
