"""``coldstart prewarm``: the minimum is raised, events are sent and followed, and the minimum is put back whatever happens."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from coldstart.cli import main
from coldstart.deploy.modal_warmers import ModalWarmer, modal_warmers
from coldstart.deploy.prewarm import DONE, FAILED, TIMED_OUT
from coldstart.deploy.rest import RestClient
from coldstart.deploy.warmers import RunPodWarmer, prewarm
from coldstart.errors import (
    ConflictError,
    CredentialsError,
    DeployError,
    PlatformBusyError,
    ResourceMissingError,
    UsageError,
)
from tests.client_plane import ClientPlane
from tests.manage_plane import API_KEY, ManagePlane

POLL_SECONDS = 0.01
LONG_SECONDS = 60.0
HANDLER = """
import no_such_package
from coldstart import coldstart

@coldstart("minilm", load=no_such_package.load, warmup=[{"texts": ["a"]}, {"texts": ["b"]}])
def handler(event, model): ...
"""


@pytest.fixture
def manage(monkeypatch):
    """A management API with one endpoint, minilm, whose minimum is 0 and maximum 3."""
    with ManagePlane() as plane:
        plane.endpoints["ep1"] = endpoint("ep1", "minilm")
        monkeypatch.setenv("RUNPOD_API_BASE_URL", plane.url)
        monkeypatch.setenv("RUNPOD_API_KEY", API_KEY)
        yield plane


@pytest.fixture
def jobs(monkeypatch):
    """A client plane, and polls that take no time."""
    with ClientPlane() as plane:
        monkeypatch.setenv("RUNPOD_ENDPOINT_BASE_URL", plane.url)
        yield plane


def endpoint(identity, name, **changes):
    """An endpoint as the management API has it."""
    workers = {"min": 0, "max": 3, "idleTimeout": 10}
    return {"id": identity, "name": name, "type": "QUEUE", "workers": workers, **changes}


@pytest.fixture
def warmer(manage, jobs):
    """Makes a warmer of the endpoint."""

    def make(count=2, inputs=({"x": 1},), name="minilm"):
        clients = {
            "manage": RestClient(manage.url, API_KEY, sleep=lambda _: None),
            "jobs": RestClient(jobs.url, API_KEY),
        }
        return RunPodWarmer(name, count, inputs, **clients, poll_seconds=POLL_SECONDS)

    return make


def warmed(*made, timeout_seconds=LONG_SECONDS, **options):
    """The result of a pre-warming with polls that take no time."""
    pairs = [each if isinstance(each, tuple) else (each, 0) for each in made]
    options = {"max_concurrent": 9, "poll_seconds": POLL_SECONDS, **options}
    return prewarm(pairs, timeout_seconds=timeout_seconds, **options)


def minimums(manage):
    """The minimums that were asked for, in order."""
    return [seen.body["workers"]["min"] for seen in manage.writes]


# --- RunPod ----------------------------------------------------------------------------------------------------------


def test_every_worker_is_warmed_and_the_minimum_put_back(warmer, manage, jobs):
    """The minimum goes to N and back, N events of the given inputs are sent, and each tells its times and worker."""
    result = warmed(warmer(inputs=({"x": 1}, {"x": 2})))
    assert result.good
    assert result.ready == {"minilm": 9}
    assert minimums(manage) == [2, 0]
    assert manage.endpoints["ep1"]["workers"] == {"min": 0, "max": 3, "idleTimeout": 10}
    assert sorted(job["input"]["x"] for job in jobs.jobs) == [1, 2]
    found = sorted(outcome.result for outcome in result.report.outcomes)
    assert found == [("worker-0", 1.5, 0.25), ("worker-1", 1.501, 0.25)]
    assert {call.authorization for call in jobs.calls} == {f"Bearer {API_KEY}"}
    assert not jobs.cancelled


def test_keep_leaves_the_minimum(warmer, manage):
    """Asked to, it stays raised."""
    warmed(warmer(), keep=True)
    assert minimums(manage) == [2]


def test_a_minimum_that_is_high_enough_is_not_touched(warmer, manage):
    """Nothing is written where as many workers are kept anyway."""
    manage.endpoints["ep1"]["workers"]["min"] = 3
    assert warmed(warmer()).good
    assert manage.writes == []


def test_a_minimum_that_somebody_else_changed_is_left(warmer, manage, jobs):
    """What was set meanwhile is not undone."""
    made = warmer()
    made.raise_minimum()
    manage.endpoints["ep1"]["workers"]["min"] = 1
    made.put_back()
    assert minimums(manage) == [2]


def test_ready_workers_are_waited_for(warmer, jobs):
    """The wait ends when enough workers are idle, at work or ready, and no sooner."""
    jobs.health = [{"initializing": 2}, {"idle": 1, "ready": 1}, {"idle": 1, "running": 1}, {"idle": 7}]
    assert warmed(warmer()).ready == {"minilm": 2}


def test_too_few_ready_workers_are_no_success(warmer, manage, jobs):
    """Where they do not come in time the result says how many there are, and the minimum is put back."""
    jobs.health = [{"idle": 1}]
    result = warmed(warmer(), timeout_seconds=0.5)
    assert result.report.good
    assert (result.ready, result.good) == ({"minilm": 1}, False)
    assert minimums(manage) == [2, 0]


def test_a_failed_warm_up_is_told_with_its_reason(warmer, manage, jobs):
    """What the handler said is the reason, the others go on, and the minimum is put back."""
    jobs.ends[0] = {"status": "FAILED", "error": "CUDA out of memory"}
    result = warmed(warmer())
    statuses = sorted(outcome.status for outcome in result.report.outcomes)
    (reason,) = (outcome.reason for outcome in result.report.outcomes if outcome.status == FAILED)
    assert statuses == [DONE, FAILED]
    assert reason == "DeployError: job job-0 FAILED: CUDA out of memory"
    assert not result.good
    assert not jobs.cancelled
    assert minimums(manage) == [2, 0]


def test_a_warm_up_whose_time_is_over_is_cancelled(warmer, manage, jobs):
    """It is taken off the queue, where it would cost money for nobody."""
    jobs.stuck = {0}
    result = warmed(warmer(count=1), timeout_seconds=0.1)
    assert [outcome.status for outcome in result.report.outcomes] == [TIMED_OUT]
    assert jobs.cancelled == ["job-0"]
    assert minimums(manage) == [1, 0]


def test_ctrl_c_cancels_the_jobs_and_puts_the_minimum_back(warmer, manage, jobs):
    """Interrupted, nothing is left: neither jobs nor workers."""
    jobs.stuck = {0, 1}

    def interrupt():
        jobs.arrived.wait(LONG_SECONDS)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = warmed(warmer())
    thread.join()
    assert result.report.interrupted
    assert sorted(jobs.cancelled) == sorted(job["id"] for job in jobs.jobs)
    assert minimums(manage) == [2, 0]


def test_a_queue_that_is_busy_is_asked_again(warmer, jobs):
    """429 was not taken for certain, so the event is sent again; anything else may have been, and is a failure."""
    jobs.refusals = [429, 429]
    assert warmed(warmer(count=1)).good
    assert len(jobs.jobs) == 1
    jobs.refusals = [500]
    (outcome,) = warmed(warmer(count=1)).report.outcomes
    assert outcome.reason.startswith("PlatformBusyError: POST ")
    assert len(jobs.jobs) == 1


@pytest.mark.parametrize("status", [0, 503])
def test_a_raise_whose_answer_is_lost_is_put_back(status, warmer, manage, jobs):
    """It may have taken effect: the endpoint is looked at, and what was raised is lowered."""
    made = warmer()
    manage.fail_next(1, status)
    manage.endpoints["ep1"]["workers"]["min"] = 2  # as if it had
    with pytest.raises(PlatformBusyError):
        warmed(made)
    assert minimums(manage) == [2, 0]
    assert not jobs.jobs


def test_putting_back_is_tried_again(warmer, manage):
    """A busy platform is asked several times."""
    made = warmer()
    made.raise_minimum()
    manage.fail_next(5, 503)
    made.put_back()
    assert manage.endpoints["ep1"]["workers"]["min"] == 0


def test_a_minimum_that_cannot_be_put_back_is_told_with_what_to_do(warmer, manage):
    """The message names the endpoint, what it may cost, and the value to set."""
    made = warmer()
    made.raise_minimum()
    manage.fail_next(1, 403)
    with pytest.raises(DeployError) as told:
        made.put_back()
    text = "the minimum of endpoint 'minilm' (ep1) may still be 2, which costs money: set it back to 0 ("
    assert str(told.value).startswith(text)
    assert API_KEY not in str(told.value)


def test_one_that_cannot_be_raised_puts_the_others_back(warmer, manage):
    """With several endpoints, an error at one leaves none raised."""
    manage.endpoints["ep2"] = endpoint("ep2", "other")
    first, second = warmer(), warmer(name="other")
    del manage.endpoints["ep2"]
    with pytest.raises(ResourceMissingError):
        warmed(first, second)
    assert manage.endpoints["ep1"]["workers"]["min"] == 0


def test_priorities_order_the_events(warmer, manage, jobs):
    """One at a time, the endpoint of higher priority is warmed first."""
    manage.endpoints["ep2"] = endpoint("ep2", "other")
    assert warmed((warmer(), 0), (warmer(name="other"), 5), max_concurrent=1).good
    sent = [call.path.split("/")[2] for call in jobs.calls if call.path.endswith("/run")]
    assert sent == ["ep2", "ep2", "ep1", "ep1"]


@pytest.mark.parametrize(
    ("endpoints", "kind", "told"),
    [
        ([], ResourceMissingError, r"no endpoint is named 'minilm' \(there: none at all\)"),
        ([("a", "other", {})], ResourceMissingError, r"\(there: other\): deploy it, or check the account"),
        ([("a", "minilm", {}), ("b", "minilm", {})], ConflictError, r"give one's id \(a, b\)"),
        ([("a", "minilm", {"type": "LOAD_BALANCER"})], UsageError, "balances load and has no queue"),
        ([("a", "minilm", {"workers": {"max": 1}})], UsageError, "may have 1 workers at most, fewer than --count 2"),
    ],
)
def test_an_endpoint_that_cannot_be_warmed_is_told(endpoints, kind, told, warmer, manage):
    """Before anything is written."""
    manage.endpoints = {identity: endpoint(identity, name, **changes) for identity, name, changes in endpoints}
    with pytest.raises(kind, match=told):
        warmer()
    assert not manage.writes


def test_an_endpoint_is_found_by_its_id(warmer):
    """Where names are ambiguous an id is not."""
    assert warmed(warmer(name="ep1")).good


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs ``coldstart prewarm`` in this process: exit status, standard output and error."""
    monkeypatch.setattr(RunPodWarmer.__init__, "__kwdefaults__", {"poll_seconds": POLL_SECONDS})

    def run(*words):
        return (main(["prewarm", *map(str, words)]), *capsys.readouterr())

    return run


def test_the_command_prints_a_table(command, manage, jobs):
    """A row a warm-up with its times and worker, a line an endpoint, and status 0."""
    status, out, err = command("minilm", "--count", 2, "--max-concurrent", 1, "--input", '{"x": 1}')
    head, first, second, last = out.splitlines()
    assert (status, err) == (0, "")
    assert head.split() == ["warm-up", "status", "seconds", "delay", "execution", "worker"]
    assert first.split()[:3] == ["minilm", "1", "done"]
    assert first.split()[4:] == ["1.50", "0.25", "worker-0"]
    assert second.split()[4:] == ["1.50", "0.25", "worker-1"]
    assert last == "minilm: 9 of 2 workers ready"


def test_the_command_fails_with_a_warm_up(command, manage, jobs):
    """One that failed makes the status 1, and its reason stands in its row."""
    jobs.ends[0] = {"status": "TIMED_OUT"}
    status, out, _ = command("minilm", "--input", "1")
    assert status == 1
    assert "failed" in out
    assert "DeployError: job job-0 TIMED_OUT: it gave no reason" in out


def test_the_handlers_own_inputs_are_sent(command, manage, jobs, tmp_path):
    """They are read from its source in turn: what the file imports need not be here."""
    (tmp_path / "handler.py").write_text(HANDLER)
    status, _, _ = command("minilm", "--count", 3, "--max-concurrent", 1, "--handler", tmp_path / "handler.py")
    assert status == 0
    assert [job["input"]["texts"] for job in jobs.jobs] == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize("with_key", [True, False])
def test_a_dry_run_prints_the_requests_and_writes_nothing(with_key, command, manage, jobs, monkeypatch):
    """What would be sent is printed in order, without the key; without a key the endpoint stands for itself."""
    if not with_key:
        monkeypatch.delenv("RUNPOD_API_KEY")
    status, out, _ = command("minilm", "--count", 2, "--input", '{"x": 1}', "--dry-run")
    identity = "ep1" if with_key else "<id of minilm>"
    verbs = [line.split()[0] for line in out.splitlines()]
    assert (status, verbs) == (0, ["PATCH", "POST", "POST", "GET", "GET", "PATCH"])
    assert f'POST {jobs.url}/{identity}/run {{"input": {{"x": 1}}}}' in out
    assert '"min": 2' in out.splitlines()[0]
    assert API_KEY not in out
    assert not manage.writes
    assert not jobs.calls


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--input", "{"], "EventError: --input '{' is not JSON"),
        (["--input", "1", "--count", "0"], "UsageError: --count 0 has to be at least 1"),
        (["--input", "1", "--max-concurrent", "0"], "UsageError: --max-concurrent 0 has to be at least 1"),
        (["--input", "1", "--timeout", "nan"], "UsageError: --timeout nan has to be a number of seconds above 0"),
        (["minilm", "--input", "1"], "UsageError: minilm given twice: raise --count instead"),
        (["--input", "1", "--priority", "x"], "UsageError: --priority 'x': give a whole number, or NAME=P"),
        (["--input", "1", "--priority", "b=1"], "UsageError: --priority 'b=1': 'b' is none of the names given"),
        (["--handler", "{folder}/bare.py"], "UsageError: {folder}/bare.py spells out no warmup= inputs: give --input"),
    ],
)
def test_wrong_usage_is_told_in_one_line(words, told, command, manage, tmp_path):
    """Each mistake is one line and status 1, and nothing was sent."""
    (tmp_path / "bare.py").write_text(HANDLER.replace(', warmup=[{"texts": ["a"]}, {"texts": ["b"]}]', ""))
    status, out, err = command("minilm", *(word.replace("{folder}", str(tmp_path)) for word in words))
    assert (status, out) == (1, "")
    assert err.startswith(f"coldstart: {told.replace('{folder}', str(tmp_path))}")
    assert err.count("\n") == 1
    assert not manage.seen


def test_priorities_are_of_all_or_of_one():
    """A number is everybody's, NAME=P is one's own, whichever is given first."""
    from coldstart.cli.prewarm import _priorities

    assert _priorities(["a", "b"], []) == {"a": 0, "b": 0}
    assert _priorities(["a", "b"], ["b=-3", "2"]) == {"a": 2, "b": -3}


def test_no_key_is_told(command, monkeypatch, manage):
    """Without a key nothing is attempted."""
    monkeypatch.delenv("RUNPOD_API_KEY")
    status, _, err = command("minilm", "--input", "1")
    assert status == 1
    assert err.startswith("coldstart: CredentialsError: RUNPOD_API_KEY is not set")


# --- Modal -----------------------------------------------------------------------------------------------------------


def _exceptions(*names):
    """Modal's own errors, as attributes."""
    error = type("Error", (Exception,), {})
    return SimpleNamespace(Error=error, **{name: type(name, (error,), {}) for name in names})


class FakeModal:
    """The part of the ``modal`` package that is used: calls are recorded and answered."""

    exception = _exceptions("NotFoundError", "AuthError", "ConnectionError", "InvalidError", "OutputExpiredError")

    def __init__(self):
        self.calls = []
        self.settings = {"min_containers": None, "max_containers": None}
        self.answers = []
        self.at_last = {"output": 1}
        self.runners = [2]
        self.fails = {}
        self.is_generator = False
        self.Cls = SimpleNamespace(from_name=self._from_name)

    def note(self, name, *arguments, **options):
        self.calls.append((name, arguments, options))
        if name in self.fails:
            raise self.fails[name]

    def _from_name(self, *arguments):
        self.note("from_name", *arguments)
        return lambda: SimpleNamespace(run=self.run())

    def run(self):
        def settings():
            self.note("settings")
            return SimpleNamespace(**self.settings)

        def update(**options):
            self.settings |= options
            self.note("update", **options)

        def spawn(value):
            self.note("spawn", value)
            if self.is_generator:
                raise self.exception.InvalidError("Cannot `spawn` a generator function.")
            return SimpleNamespace(get=self.get, cancel=lambda: self.note("cancel"))

        def remote_gen(value):
            self.note("remote_gen", value)
            yield from "ab"

        def get_current_stats():
            self.note("get_current_stats")
            return SimpleNamespace(num_total_runners=self.runners.pop(0) if len(self.runners) > 1 else self.runners[0])

        return SimpleNamespace(
            autoscaler=SimpleNamespace(settings=settings, update=update),
            spawn=spawn,
            remote_gen=remote_gen,
            get_current_stats=get_current_stats,
        )

    def get(self, timeout):
        self.note("get", timeout=timeout)
        answer = self.answers.pop(0) if self.answers else self.at_last
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def of(self, name):
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.fixture
def modal(monkeypatch):
    """A fake ``modal`` in the place of the real one."""
    fake = FakeModal()
    monkeypatch.setitem(sys.modules, "modal", fake)
    monkeypatch.setattr(ModalWarmer.__init__, "__kwdefaults__", {"poll_seconds": POLL_SECONDS})
    return fake


def modal_warmer(count=2, inputs=({"x": 1}, {"x": 2})):
    """A warmer of a Modal class."""
    return ModalWarmer("app", count, inputs, class_name="Model")


def test_modal_is_warmed_by_spawns_and_the_autoscaler_put_back(modal):
    """The minimum goes to N and back, N inputs are spawned and their answers waited for, then the containers."""
    modal.answers = [TimeoutError(), TimeoutError()]
    modal.runners = [0, 1, 2]
    result = warmed(modal_warmer())
    assert result.good
    assert modal.of("from_name") == [(("app", "Model"), {})]
    assert modal.of("update") == [((), {"min_containers": 2}), ((), {"min_containers": 0})]
    assert sorted(arguments[0]["x"] for arguments, _ in modal.of("spawn")) == [1, 2]
    assert len(modal.of("get")) == 4
    assert result.ready == {"app": 2}
    assert not modal.of("cancel")


def test_modal_streams_are_called_to_their_end(modal):
    """A generator cannot be spawned: its pieces are taken instead."""
    modal.is_generator = True
    assert warmed(modal_warmer(count=1)).good
    assert modal.of("remote_gen") == [(({"x": 1},), {})]


def test_modal_that_keeps_enough_is_not_touched(modal):
    """Nothing is changed where as many containers are kept anyway; ``keep`` puts nothing back."""
    modal.settings["min_containers"] = 5
    assert warmed(modal_warmer()).good
    assert not modal.of("update")
    modal.settings["min_containers"] = 1
    assert warmed(modal_warmer(), keep=True).good
    assert modal.of("update") == [((), {"min_containers": 2})]


def test_modal_inputs_whose_time_is_over_are_cancelled(modal):
    """The call is taken back, and so is the minimum."""
    modal.at_last = TimeoutError()
    result = warmed(modal_warmer(count=1), timeout_seconds=0.1)
    assert [outcome.status for outcome in result.report.outcomes] == [TIMED_OUT]
    assert len(modal.of("cancel")) == 1
    assert modal.of("update")[-1] == ((), {"min_containers": 0})


def test_what_a_modal_method_raises_is_the_reason(modal):
    """The user's own error is told by type and text."""
    modal.answers = [ValueError("no such text")]
    (outcome,) = warmed(modal_warmer(count=1)).report.outcomes
    assert (outcome.status, outcome.reason) == (FAILED, "ValueError: no such text")


@pytest.mark.parametrize(
    ("name", "kind", "told"),
    [
        ("NotFoundError", ResourceMissingError, "give APP/Class as it was deployed"),
        ("AuthError", CredentialsError, "run modal setup, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"),
        ("ConnectionError", PlatformBusyError, "Modal, of 'app': ConnectionError: text"),
        ("InvalidError", DeployError, "Modal, of 'app': InvalidError: text"),
    ],
)
def test_modals_errors_are_told_as_ours(name, kind, told, modal):
    """By condition, with what to do."""
    modal.fails["settings"] = getattr(modal.exception, name)("text")
    with pytest.raises(kind, match=told):
        warmed(modal_warmer())
    assert not modal.of("update")


def test_a_modal_minimum_that_cannot_be_put_back_is_told(modal):
    """The message names the app and the value to set."""
    made = modal_warmer()
    made.raise_minimum()
    modal.fails["settings"] = modal.exception.Error("gone")
    with pytest.raises(DeployError, match="the minimum of 'app' may still be 2, which costs money: set it back to 0"):
        made.put_back()


def test_modal_that_may_have_fewer_is_told(modal):
    """A maximum below the count is a mistake, and nothing is changed."""
    modal.settings["max_containers"] = 1
    with pytest.raises(UsageError, match="may have 1 containers at most, fewer than --count 2"):
        warmed(modal_warmer())
    assert not modal.of("update")


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("all-minilm", [], ("all-minilm", "AllMinilm")),
        ("app/Other", [], ("app", "Other")),
        ("app", ["--handler", "{folder}/handler.py"], ("app", "Minilm")),
    ],
)
def test_the_command_finds_the_class(name, options, found, modal, capsys, tmp_path):
    """``APP/Class`` names it; else it is what ``coldstart deploy`` calls the class of the handler, or of the app's name."""
    (tmp_path / "handler.py").write_text(HANDLER)
    words = [option.format(folder=tmp_path) for option in options] or ["--input", "1"]
    assert main(["prewarm", name, "--platform", "modal", *words]) == 0
    assert modal.of("from_name") == [(found, {})]
    assert f"{name}: 2 of 1 workers ready" in capsys.readouterr().out


def test_a_dry_run_of_modal_calls_nothing(modal, capsys):
    """The calls are printed."""
    assert main(["prewarm", "app/Model", "--platform", "modal", "--input", '{"x": 1}', "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "modal.Cls.from_name('app', 'Model')().run.spawn({'x': 1})" in out
    assert not modal.calls


def test_the_fake_takes_what_the_real_package_takes():
    """Every call that the fake answers can be made of the installed ``modal``, with the same arguments."""
    real = pytest.importorskip("modal")
    fake = FakeModal()
    inspect.signature(real.Cls.from_name).bind("app", "Model")
    inspect.signature(real.Function.spawn).bind(None, {"x": 1})
    inspect.signature(real.Function.remote_gen).bind(None, {"x": 1})
    inspect.signature(real.Function.get_current_stats).bind(None)
    inspect.signature(real.FunctionCall.get).bind(None, timeout=1.0)
    inspect.signature(real.FunctionCall.cancel).bind(None)
    autoscaler = real.Function.from_name("app", "f").autoscaler
    inspect.signature(autoscaler.update).bind_partial(min_containers=2)
    assert callable(autoscaler.settings)
    assert {"min_containers", "max_containers"} <= set(real.types.FunctionAutoscalerSettings.__annotations__)
    assert "num_total_runners" in real.types.FunctionCurrentStats.__annotations__
    for name, kind in vars(fake.exception).items():
        if isinstance(kind, type):
            assert issubclass(getattr(real.exception, name), real.exception.Error)


def test_modal_that_is_not_installed_is_told(monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(UsageError, match=r'pip install "coldstart-gpu\[modal\]"'):
        modal_warmers(["app"], 1, ({},), class_name="")
