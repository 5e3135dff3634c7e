"""Jobs are real processes: how they end, why, and that nothing of them is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import alive, wait_until

from atommem_env.errors import JobFailed
from train.cluster import jobs
from train.cluster.jobs import LocalJob, check_running, root_cause


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('what was wrong')", r"ended with exit code 1: ValueError: what was wrong\n.*job\.log"),
        ("import os; print('no traceback'); os.kill(os.getpid(), 9)", r"was ended by SIGKILL\n"),
        ("raise SystemExit(3)", r"ended with exit code 3\n"),
    ],
)
def test_the_end_of_a_job_is_one_error_with_its_cause(
    code: str, message: str, start: Callable[..., LocalJob], tmp_path: Path
) -> None:
    # of a run before this one; it stays
    (tmp_path / "job.log").write_text("Traceback\n  File 'x'\nOldError: of yesterday\n")
    job = start(code)
    job.process.wait()
    with pytest.raises(JobFailed, match=message) as caught:
        check_running("The job", job)
    assert "OldError" not in str(caught.value)
    assert "OldError" in (tmp_path / "job.log").read_text()


STUBBORN = """
    import signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"])
    print(child.pid)
    time.sleep(99)
"""


def test_stopping_leaves_no_process(
    start: Callable[..., LocalJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start(STUBBORN)
    wait_until(lambda: job.output().strip())
    child = int(job.output())
    assert alive(child)
    job.stop()
    assert not alive(job.process.pid)
    wait_until(lambda: not alive(child))
    job.stop()  # again: nothing happens
    monkeypatch.setattr(jobs, "_GRACE", 0.2)
    deaf = start("import signal, time; signal.signal(15, signal.SIG_IGN); print('ready'); time.sleep(99)")
    wait_until(lambda: "ready" in deaf.output())
    deaf.stop()
    assert deaf.poll() == "was ended by SIGKILL"


# ----------------------------------------------------------------------------------------------------- why a job ended


QUIET = """\
all is well
    indented: this is no traceback
Note: nor is this
"""
PLAIN = """\
Traceback (most recent call last):
  File "a", line 1, in f
    g()
    ~^^
KeyError: 'b'
"""
CHAIN = """\
Traceback (most recent call last):
  File "a", line 1
OSError: refused

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b", line 2
atommem_env.errors.EmbeddingError: no answer
"""
NESTED = """\
Traceback (most recent call last):
  File "/a.py", line 3, in <module>
    ray.get(ref)
ray.exceptions.RayTaskError(EngineDied): \x1b[36mray::Trainer.fit()\x1b[39m (pid=7, ip=10.0.0.1)
  File "/b.py", line 4, in fit
    step()
ray.exceptions.RayTaskError(EngineDied): \x1b[36mray::Engine.play()\x1b[39m (pid=8, ip=10.0.0.2)
  File "/c.py", line 5, in play
atommem_env.errors.EngineDied: the engine is gone
\x1b[36m(Policy pid=9)\x1b[0m Traceback (most recent call last):
\x1b[36m(Policy pid=9)\x1b[0m   File "/d.py", line 6, in g
\x1b[36m(Policy pid=9)\x1b[0m RuntimeError: Connection closed by peer
"""
ASIDE = f"""\
{PLAIN}Exception in thread printer:
Traceback (most recent call last):
  File "/a.py", line 3, in run
RuntimeError: can't register atexit after shutdown
Exception ignored in: <function f at 0x7f>
Traceback (most recent call last):
  File "/a.py", line 3, in f
TypeError: 'NoneType' object is not callable
"""
DIED = """\
Traceback (most recent call last):
  File "/a.py", line 3, in <module>
    ray.get(ref)
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: LLMRayActor
\tactor_id: 12
The actor is dead
"""
VLLM_FAILED = """\
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1] Traceback (most recent call last):
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1]   File "/v.py", line 1, in g
(EngineCore pid=5) ERROR 11-21 12:00:01 [core.py:1] ValueError: no memory for the cache
(APIServer pid=4) Traceback (most recent call last):
(APIServer pid=4)   File "/w.py", line 1, in f
(APIServer pid=4) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (QUIET, ""),
        (PLAIN, "KeyError: 'b'"),
        (CHAIN, "atommem_env.errors.EmbeddingError: no answer"),
        (NESTED, "atommem_env.errors.EngineDied: the engine is gone"),
        (ASIDE, "KeyError: 'b'"),
        (DIED, r"ray\.exceptions\.ActorDiedError: The actor died .* task\. class_name: LLMRayActor actor_id: 12"),
        (VLLM_FAILED, "ValueError: no memory for the cache"),
    ],
)
def test_the_cause_is_found_in_a_log(log: str, cause: str) -> None:
    assert re.fullmatch(cause, root_cause(log))
