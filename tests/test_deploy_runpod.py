"""Deploying to RunPod: what a plan has, what is sent to the API, and what the command says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from coldstart.cli import main
from coldstart.deploy.apply import apply_plan, delete
from coldstart.deploy.plan import GPU_POOLS, make_plan, pool_of
from coldstart.deploy.rest import RestClient
from coldstart.deploy.shape import read_shape
from coldstart.errors import ConfigError, ConflictError, HandlerError, RequestInvalidError, ResourceMissingError
from coldstart.script import read_script
from tests.manage_plane import API_KEY, ManagePlane

HANDLERS = Path(__file__).parent.parent / "handlers"
STORE = {
    "COLDSTART_STORE": "r2://bucket/prefix",
    "COLDSTART_R2_ACCOUNT_ID": "account",
    "COLDSTART_ACCESS_KEY_ID": "access-id",
    "COLDSTART_SECRET_ACCESS_KEY": "secret-access",
}
BLOCK = """# /// script
# [tool.coldstart]
# gpu = "L4"
# env = {MODEL = "small"}
# [tool.coldstart.runpod]
# registry = "reg1"
# data_centers = ["EU-RO-1"]
# secrets = {HF_TOKEN = "hf"}
# ///
"""
CODE = """from coldstart import coldstart
@coldstart("m", load=one, env=["MODE", "UNSET"], secrets=["HF_TOKEN", "API_TOKEN"])
def handler(event, model): ...
"""


@pytest.fixture
def plane():
    """The API, empty."""
    with ManagePlane() as server:
        yield server


@pytest.fixture
def client(plane):
    """A client of it."""
    return RestClient(plane.url, API_KEY, sleep=lambda _: None)


@pytest.fixture
def target(tmp_path):
    """A handler's file with a block and two secrets."""
    path = tmp_path / "handler.py"
    path.write_text(BLOCK + CODE)
    return str(path)


def plan_of(path, image="me/m:1", environment=None, script=None, **options):
    """The plan of a file, deployed from an environment that has a store and the file's secrets."""
    given = {**STORE, "API_TOKEN": "hunter2", "MODE": "fast"} if environment is None else environment
    return make_plan(read_shape(path), script or read_script(path), image, environment=given, **options)


def unexpected(errors):
    """What the command said to standard error, without the note on GPUs."""
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("note: workers get a GPU"))


@pytest.fixture
def plan(target):
    """The plan of the file."""
    return plan_of(target)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_two_bodies(plan):
    """Template and endpoint are what the API is to have, to the last field."""
    assert plan.template == {
        "name": "coldstart-m", "image": "me/m:1", "serverless": True, "disk": 20, "registry": "reg1",
        "env": {
            **STORE, "API_TOKEN": "hunter2", "COLDSTART_HANDLER": "m", "HF_TOKEN": "{{ RUNPOD_SECRET_hf }}", "MODE": "fast",
            "MODEL": "small",
        },
    }  # fmt: skip
    assert plan.endpoint == {
        "name": "m", "type": "QUEUE", "gpu": {"pools": ["AMPERE_24"], "count": 1},
        "workers": {"min": 0, "max": 3, "idleTimeout": 30}, "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "flashboot": "FLASHBOOT", "networkVolumes": [], "dataCenterIds": ["EU-RO-1"], "timeout": 300_000,
    }  # fmt: skip
    assert plan.hidden == ("hunter2", "access-id", "secret-access")


def test_secret_values_are_shown_to_nobody(plan):
    """A body as people see it has no secret's value; names of RunPod secrets are none."""
    shown = plan.shown(plan.template)
    assert not any(value in json.dumps(shown) for value in plan.hidden)
    assert (shown["env"]["API_TOKEN"], shown["env"]["HF_TOKEN"]) == ("****", "{{ RUNPOD_SECRET_hf }}")
    assert shown["env"]["MODEL"] == "small"
    assert plan.shown(None) is None


def test_the_block_sets_what_it_names(target):
    """Concurrency, pools, workers, times and FlashBoot follow the block."""
    script = read_script(target)
    script = script._replace(
        concurrency=4, gpu_count=2, min_workers=1, max_workers=9, idle_seconds=5, timeout_seconds=7,
        runpod=script.runpod._replace(gpu=("ADA_24", "ADA_80_PRO"), flashboot="off", disk_gb=99, network_volumes=("v",)),
    )  # fmt: skip
    found = plan_of(target, script=script, name="other")
    assert found.template["env"]["COLDSTART_CONCURRENCY"] == "4"
    assert (found.template["name"], found.template["disk"]) == ("coldstart-other", 99)
    assert found.endpoint["gpu"] == {"pools": ["ADA_24", "ADA_80_PRO"], "count": 2}
    assert found.endpoint["workers"] == {"min": 1, "max": 9, "idleTimeout": 5}
    assert [found.endpoint[key] for key in ("timeout", "flashboot", "networkVolumes")] == [7000, "OFF", ["v"]]


def test_a_handler_without_a_gpu_runs_on_processors():
    """No GPU in the block means CPU workers."""
    found = plan_of(str(HANDLERS / "digits.py"))
    assert "gpu" not in found.endpoint
    assert found.endpoint["cpu"] == [{"id": "cpu5c", "vcpuCount": 4}, {"id": "cpu3c", "vcpuCount": 4}]


@pytest.mark.parametrize(
    ("gpu", "pool"),
    [("L4", "AMPERE_24"), ("h100!", "ADA_80_PRO"), ("RTX 4090", "ADA_24"), ("NVIDIA GeForce RTX 5090", "ADA_32_PRO"),
     ("A100_80gb", "AMPERE_80"), ("RTX-PRO-6000", "BLACKWELL_96"), ("rtx a6000", "AMPERE_48"), ("B200", "BLACKWELL_180")],
)  # fmt: skip
def test_gpus_are_known_however_they_are_written(gpu, pool):
    """A GPU's name leads to its pool whatever its case, spaces and maker's words."""
    assert pool_of(gpu) == pool


def test_unknown_gpus_are_refused_with_the_known_ones():
    """A GPU that no pool is known for is an error that lists those that are, and the way around."""
    with pytest.raises(HandlerError, match=r"no pool for GPU 'T4'.*L40S, .*name pools in \[tool.coldstart.runpod\]"):
        pool_of("T4")
    assert len({re.sub("[^A-Z0-9]", "", name.upper()) for name in GPU_POOLS}) == len(GPU_POOLS)


def test_two_gpus_of_one_pool_are_one_pool(target):
    """GPUs by preference become pools in that order, each once."""
    script = read_script(target)._replace(gpu=("H100", "L4", "A5000"))
    assert plan_of(target, script=script).endpoint["gpu"]["pools"] == ["ADA_80_PRO", "AMPERE_24"]


def test_all_missing_secrets_are_told_at_once(tmp_path):
    """Secrets that are nowhere are one error with all their names; no value of another one is in it."""
    path = tmp_path / "handler.py"
    path.write_text(CODE)
    with pytest.raises(ConfigError) as caught:
        plan_of(str(path), environment={**STORE, "MODE": "x", "API_TOKEN": ""})
    assert "handler 'm' needs the secrets HF_TOKEN, API_TOKEN: set them where you deploy" in str(caught.value)
    assert "secret-access" not in str(caught.value)


def test_a_secret_may_not_stand_in_the_file(target):
    """A name in both secrets= and the block's env is refused without its value."""
    script = read_script(target)._replace(env={"API_TOKEN": "hunter2"})
    with pytest.raises(HandlerError, match=r"^API_TOKEN is secret and stands in tool.coldstart.env") as caught:
        plan_of(target, script=script)
    assert "hunter2" not in str(caught.value)


def test_the_stores_credentials_may_be_runpod_secrets_or_aws_names(target):
    """Credentials come as RunPod secrets, then nobody's environment is read, or from AWS names, under our own."""
    script = read_script(target)
    secrets = {"COLDSTART_ACCESS_KEY_ID": "id", "COLDSTART_SECRET_ACCESS_KEY": "key", **script.runpod.secrets}
    referring = script._replace(runpod=script.runpod._replace(secrets=secrets))
    found = plan_of(target, script=referring)
    assert found.template["env"]["COLDSTART_SECRET_ACCESS_KEY"] == "{{ RUNPOD_SECRET_key }}"
    assert found.hidden == ("hunter2",)
    aws = {
        "COLDSTART_STORE": "s3://b",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_SESSION_TOKEN": "t",
    }
    found = plan_of(target, environment={**aws, "AWS_REGION": "eu-west-1", "API_TOKEN": "x"})
    ours = {name: value for name, value in found.template["env"].items() if name.startswith(("COLDSTART_", "AWS_"))}
    assert ours == {
        "COLDSTART_STORE": "s3://b", "COLDSTART_REGION": "eu-west-1", "COLDSTART_ACCESS_KEY_ID": "a",
        "COLDSTART_SECRET_ACCESS_KEY": "s", "COLDSTART_SESSION_TOKEN": "t", "COLDSTART_HANDLER": "m",
    }  # fmt: skip
    assert found.notes[0] == "the store's credentials are temporary: workers lose the store when they expire"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "COLDSTART_STORE is not set, so no worker would find another's snapshot"),
        ({"COLDSTART_STORE": "file:///tmp/x"}, "COLDSTART_STORE=file:///tmp/x is a folder of each worker's own"),
        ({"COLDSTART_STORE": "/runpod-volumes"}, "is a folder of each worker's own"),
        ({"COLDSTART_STORE": "/runpod-volume/x"}, "is on a network volume, and the endpoint has none"),
        ({"COLDSTART_STORE": "s3://b"}, "without COLDSTART_ACCESS_KEY_ID or AWS_ACCESS_KEY_ID, COLDSTART_SECRET"),
        ({**STORE, "COLDSTART_R2_ACCOUNT_ID": ""}, "without COLDSTART_R2_ACCOUNT_ID or COLDSTART_ENDPOINT_URL"),
        ({**STORE, "COLDSTART_STORE": "gopher"}, "COLDSTART_STORE='gopher' cannot be used"),
    ],
)
def test_stores_that_workers_could_not_use_are_refused(target, environment, message):
    """A store that workers do not share or cannot reach is an error before anything is built or sent."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(target, environment={**environment, "API_TOKEN": "x"})


def test_stores_that_are_meant_are_taken(target):
    """A folder of a network volume that is there, no store at all, and a local one on request, are taken."""
    script = read_script(target)
    script = script._replace(runpod=script.runpod._replace(network_volumes=("v",)))
    tokens = {"API_TOKEN": "x"}
    volume = plan_of(target, environment={**tokens, "COLDSTART_STORE": "file:///runpod-volume/s"}, script=script)
    assert volume.template["env"]["COLDSTART_STORE"] == "file:///runpod-volume/s"
    off = plan_of(target, environment={**tokens, **STORE, "COLDSTART_STORE": "off"})
    assert [name for name in off.template["env"] if name.startswith("COLDSTART_")] == [
        "COLDSTART_HANDLER",
        "COLDSTART_STORE",
    ]
    assert "COLDSTART_STORE" not in plan_of(target, environment=tokens, allow_local_store=True).template["env"]
    in_file = script._replace(env={"COLDSTART_STORE": "off"})
    assert plan_of(target, script=in_file).template["env"]["COLDSTART_STORE"] == "off"


@pytest.mark.parametrize("name", [" m", "x" * 101, "a\nb"])
def test_what_cannot_name_an_endpoint_is_refused(target, name):
    """A name that nobody could type again is refused."""
    with pytest.raises(ConfigError, match="cannot name an endpoint"):
        plan_of(target, name=name)


# --- applying --------------------------------------------------------------------------------------------------------


def test_deploying_twice_changes_nothing(plane, client, plan):
    """The first time creates template and endpoint with exactly the planned bodies, the second time writes nothing."""
    assert list(map(str, apply_plan(client, plan))) == [
        "template coldstart-m (tem1) created",
        "endpoint m (ser2) created",
    ]
    assert [(each.method, each.path, each.body) for each in plane.writes] == [
        ("POST", "/v2/templates", plan.template), ("POST", "/v2/serverless", {**plan.endpoint, "templateId": "tem1"}),
    ]  # fmt: skip
    assert plane.endpoints["ser2"]["env"] == plan.template["env"]
    assert [step.action for step in apply_plan(client, plan)] == ["unchanged", "unchanged"]
    assert len(plane.writes) == 2


def test_only_what_differs_is_changed(plane, client, target, plan):
    """A new image and environment go to the template and to the endpoint, which has its own copy; nothing else does."""
    apply_plan(client, plan)
    script = read_script(target)._replace(max_workers=5)
    changed = plan_of(target, "me/m:2", {**STORE, "API_TOKEN": "hunter3"}, script=script)
    first, second = apply_plan(client, changed)
    assert str(first) == "template coldstart-m (tem1) updated: env, image"
    assert str(second) == "endpoint m (ser2) updated: env, image, workers"
    sent = {"image": "me/m:2", "env": changed.template["env"]}
    assert [(each.method, each.path, each.body) for each in plane.writes[2:]] == [
        ("PATCH", "/v2/templates/tem1", sent), ("PATCH", "/v2/serverless/ser2", {**sent, "workers": changed.endpoint["workers"]}),
    ]  # fmt: skip
    assert "MODE" not in plane.endpoints["ser2"]["env"]
    assert [step.action for step in apply_plan(client, changed)] == ["unchanged", "unchanged"]


def test_what_is_half_there_is_completed(plane, client, plan):
    """A deployment that broke off after the template is completed by the next one."""
    apply_plan(client, plan)
    plane.endpoints.clear()
    assert [step.action for step in apply_plan(client, plan)] == ["unchanged", "created"]


def test_cpu_endpoints_are_left_as_they_are(client):
    """What RunPod adds to an endpoint's settings, and the order of lists, is no difference."""
    path = str(HANDLERS / "digits.py")
    apply_plan(client, plan_of(path))
    assert [step.action for step in apply_plan(client, plan_of(path))] == ["unchanged", "unchanged"]


def test_two_endpoints_of_one_name_are_a_conflict(plane, client, plan):
    """Where a name means two endpoints, nothing is written, and the error has the ids."""
    apply_plan(client, plan)
    plane.endpoints["twin"] = {**plane.endpoints["ser2"], "id": "twin"}
    for attempt in (lambda: apply_plan(client, plan), lambda: delete(client, "m")):
        with pytest.raises(ConflictError, match=r"there are 2 endpoints named 'm' \(ser2, twin\)"):
            attempt()
    assert len(plane.writes) == 2


def test_somebody_elses_resources_are_left_alone(plane, client, plan):
    """An endpoint or template of the name that coldstart did not make is neither changed nor deleted."""
    for there in (plane.endpoints, plane.templates):
        apply_plan(client, plan)
        writes = len(plane.writes)
        next(iter(there.values()))["env"] = {}
        for attempt in (lambda: apply_plan(client, plan), lambda: delete(client, "m")):
            with pytest.raises(ConflictError, match="was not made by coldstart"):
                attempt()
        assert len(plane.writes) == writes
        there.clear()


def test_what_runpod_cannot_change_is_told(plane, client, target, plan):
    """An endpoint cannot go from GPU to CPU, or become a queue: the error says to delete it, before any write."""
    apply_plan(client, plan)
    script = read_script(target)._replace(gpu=())
    with pytest.raises(ConflictError, match="differs in gpu or cpu, which RunPod cannot change"):
        apply_plan(client, plan_of(target, "me/m:2", script=script))
    plane.endpoints["ser2"]["type"] = "LOAD_BALANCER"
    with pytest.raises(ConflictError, match="differs in type"):
        apply_plan(client, plan)
    assert len(plane.writes) == 2


def test_deleting_takes_both(plane, client, plan):
    """Deleting removes endpoint and template; what is gone already is no error as long as something was there."""
    apply_plan(client, plan)
    assert list(map(str, delete(client, "m"))) == ["endpoint m (ser2) deleted", "template coldstart-m (tem1) deleted"]
    assert plane.endpoints == plane.templates == {}
    with pytest.raises(ResourceMissingError, match="no endpoint 'm' and no template of it"):
        delete(client, "m")


def test_a_deletion_whose_answer_was_lost_is_done(plane, client, plan):
    """A deletion that went through without an answer is repeated, finds nothing, and counts as done."""
    apply_plan(client, plan)

    class Forgetful:
        """Deletes, loses the answer, and asks again, as the client does."""

        base_url = client.base_url

        def request(self, method, path, body=None):
            """One request; deletions twice."""
            if method == "DELETE":
                client.request(method, path)
            return client.request(method, path, body)

    assert [step.action for step in delete(Forgetful(), "m")] == ["deleted", "deleted"]


def test_what_the_api_refuses_is_shown(client, target):
    """What the API finds wrong with a body comes through with its list of errors."""
    script = read_script(target)
    script = script._replace(runpod=script.runpod._replace(data_centers=("",)))
    with pytest.raises(RequestInvalidError, match="- dataCenterIds: must be a string"):
        apply_plan(client, plan_of(target, script=script))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def deploying(plane, monkeypatch):
    """The environment of somebody who deploys."""
    for name, value in {**STORE, "API_TOKEN": "hunter2", "RUNPOD_API_BASE_URL": plane.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RUNPOD_API_KEY", API_KEY)


@pytest.fixture
def run(target, capsys):
    """Run the command on the file: its status, output and errors."""

    def call(*words, platform="runpod"):
        status = main(["deploy", platform, target, *words])
        return (status, *capsys.readouterr())

    return call


def recorded(plane):
    """The writing requests that arrived, as the dry run prints them, without the secrets' values."""
    lines = []
    for each in plane.writes:
        body = json.loads(json.dumps(each.body).replace('"tem1"', '"<id of coldstart-m>"'))
        for name in {"API_TOKEN", "COLDSTART_ACCESS_KEY_ID", "COLDSTART_SECRET_ACCESS_KEY"} & set(
            (body or {}).get("env", ())
        ):
            body["env"][name] = "****"
        lines.append(f"{each.method} {plane.url}{each.path}\n")
        lines.append("" if body is None else json.dumps(body, indent=2, sort_keys=True) + "\n")
    return "".join(lines)


def test_a_dry_run_prints_what_a_real_one_sends(plane, deploying, run):
    """For creating, changing and deleting, the printed requests are those that the real run then sends."""
    for words in (["--image", "me/m:1"], ["--image", "me/m:2", "--max-workers", "7", "--gpu", "H100"], ["--delete"]):
        status, printed, errors = run(*words, "--dry-run")
        assert (status, unexpected(errors), plane.writes) == (0, "", [])
        assert "hunter2" not in printed
        assert run(*words)[0] == 0
        assert printed == recorded(plane)
        plane.seen.clear()


def test_the_command_says_what_it_did(plane, deploying, run):
    """Deploying prints each step and where events go; doing it again says that nothing changed."""
    status, printed, errors = run("--image", "me/m:1", "--concurrency", "3")
    assert (status, unexpected(errors)) == (0, "")
    assert printed.splitlines() == [
        "template coldstart-m (tem1) created", "endpoint m (ser2) created",
        "send events to https://api.runpod.ai/v2/ser2/runsync",
    ]  # fmt: skip
    assert plane.endpoints["ser2"]["env"]["COLDSTART_CONCURRENCY"] == "3"
    assert "endpoint m (ser2) unchanged" in run("--image", "me/m:1", "--concurrency", "3")[1]
    assert run("--delete")[1].splitlines() == ["endpoint m (ser2) deleted", "template coldstart-m (tem1) deleted"]


def test_without_a_key_a_dry_run_takes_the_account_for_empty(deploying, run, monkeypatch):
    """A dry run needs no key: it prints the creation and says what it does not know."""
    monkeypatch.delenv("RUNPOD_API_KEY")
    status, printed, errors = run("--image", "me/m:1", "--dry-run")
    assert (status, printed.count("POST ")) == (0, 2)
    assert unexpected(errors) == "note: RUNPOD_API_KEY is not set: the account is taken to be empty\n"
    status, printed, errors = run("--image", "me/m:1")
    assert (status, printed) == (1, "")
    assert unexpected(errors).startswith("coldstart: CredentialsError: RUNPOD_API_KEY is not set")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say where the image goes: --registry"),
        (("--image", "x", "--max-workers", "0"), "--max-workers 0 has to be a whole number from 1 to 1000"),
        (("--image", "x", "--min-workers", "4"), "4 workers at least are more than 3 at most"),
        (("--image", "x", "--gpu", "abacus"), "no pool for GPU 'abacus'"),
        (("--registry", "Not A Repository"), "has to be a repository without a tag"),
    ],
)
def test_what_the_command_cannot_mean_is_refused(plane, deploying, run, words, message):
    """Wrong options are errors before anything is asked of the API."""
    status, printed, errors = run(*words)
    assert (status, printed) == (1, "")
    assert message in errors
    assert plane.seen == []


def test_a_registry_means_a_built_image(plane, deploying, run):
    """With --registry, the endpoint gets the image whose tag is the hash of what is in it."""
    status, printed, _ = run("--registry", "ghcr.io/me/m", "--dry-run")
    assert status == 0
    assert re.search(r'"image": "ghcr.io/me/m:[0-9a-f]{16}"', printed)


@pytest.mark.parametrize("status", [400, 401, 403, 409, 422, 429, 500])
def test_failures_of_the_api_are_told_without_secrets(plane, deploying, run, status):
    """Whatever the API answers, the command says so with its words, and neither the key nor a secret that it repeats."""
    plane.fail_next(2, 200, {"templates": [], "endpoints": []})
    plane.fail_next(1, status, {"title": "Bad", "detail": f"env API_TOKEN=hunter2, key {API_KEY}"})
    code, printed, errors = run("--image", "me/m:1")
    assert (code, printed) == (1, "")
    assert f"POST {plane.url}/v2/templates: {status} Bad: env API_TOKEN=****, key ****" in errors
    assert "hunter2" not in errors
    assert API_KEY not in errors


def test_temporary_credentials_are_told(plane, deploying, run, monkeypatch):
    """Deploying with credentials that expire says so, and goes on."""
    monkeypatch.setenv("COLDSTART_SESSION_TOKEN", "t")
    status, _, errors = run("--image", "me/m:1")
    assert status == 0
    assert errors.startswith("note: the store's credentials are temporary")


@pytest.mark.parametrize(
    "words",
    [
        ["deploy"],
        ["deploy", "mars", "x.py"],
        ["deploy", "runpod"],
        ["deploy", "runpod", "x.py", "--image", "a", "--registry", "b"],
    ],
)
def test_wrong_words_are_usage_errors(words, capsys):
    """A missing platform, an unknown one, a missing file and two images are wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: coldstart deploy" in capsys.readouterr().err


def test_help_is_told_without_the_other_platform(capsys, monkeypatch):
    """The help of one platform lists its options and imports nothing of the other one."""
    monkeypatch.delitem(sys.modules, "coldstart.deploy.modal", raising=False)
    with pytest.raises(SystemExit):
        main(["deploy", "runpod", "--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--registry", "--dry-run", "--idle-seconds", "FILE[:NAME]"))
    assert "coldstart.deploy.modal" not in sys.modules


def test_the_pages_block_and_commands_are_understood(tmp_path, deploying, capsys, monkeypatch):
    """The block of deploy/runpod/README.md is read, and its deploy commands are ones that this version has."""
    page = (HANDLERS.parent / "deploy" / "runpod" / "README.md").read_text()
    block = re.search(r"    # /// script\n.*?    # ///\n", page, re.DOTALL)[0]
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "minilm.py").write_text(re.sub(r"(?m)^    ", "", block) + CODE)
    monkeypatch.chdir(tmp_path)
    assert read_script("handlers/minilm.py").runpod.secrets == {"HF_TOKEN": "hf"}
    commands = re.findall(r"(?m)^    coldstart (deploy [^#\n]+)", page)
    main([*commands[2].replace("<tag>", "1").split()])
    assert len(commands) == 4
    for command in commands:
        assert main([*command.replace("<tag>", "1").split(), *([] if "--dry-run" in command else ["--dry-run"])]) == 0
    assert unexpected(capsys.readouterr().err) == ""
