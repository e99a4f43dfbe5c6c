"""The cluster without Kubernetes, and the guides: what their files, commands and queries say works.

What is rendered for Kubernetes is tested in `tests/deployment`.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import duckdb
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from jobs import cli
from jobs.runs.publication import Run
from jobs.storage import writing
from nsnet import recipes
from tests.support.manifests import complaints
from tests.support.tables import manifest_row, manifest_table, verdict_row, verdict_table

REPO_ROOT = Path(__file__).parents[1]
RAY_UP = REPO_ROOT / "cluster/ray-up.yaml"
GUIDE = REPO_ROOT / "docs/how-to/operations.md"
REPRODUCE = REPO_ROOT / "docs/how-to/reproduce.md"


@pytest.fixture
def ray_up() -> dict[str, Any]:
    """The cluster without Kubernetes."""
    found: dict[str, Any] = yaml.safe_load(RAY_UP.read_text())
    return found


# The cluster without Kubernetes.


def test_cluster_without_kubernetes_is_what_ray_declares(ray_up: dict[str, Any]) -> None:
    declared = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    assert complaints(ray_up, declared) == []
    assert complaints({**ray_up, "max_worker": 3}, declared) != []  # the schema is closed: it would see a misspelling
    types = ray_up["available_node_types"]
    assert ray_up["head_node_type"] in types and types["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    workers = {name: kind for name, kind in types.items() if name != "head"}
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) <= ray_up["max_workers"]
    assert 1 <= types["training"]["min_workers"] < types["training"]["max_workers"]
    assert re.fullmatch(r"[^:@]+@sha256:[0-9a-f]{64}", ray_up["docker"]["image"])  # a tag may be moved


def test_cluster_without_kubernetes_takes_no_commands_without_a_token(ray_up: dict[str, Any]) -> None:
    options = ray_up["docker"]["run_options"]
    ((place, origin),) = ray_up["file_mounts"].items()
    assert {"--env RAY_AUTH_MODE=token", f"--env RAY_AUTH_TOKEN_PATH={place}"} <= {*options}
    # not below `~`: Ray takes that for /root where an image sets no HOME, and containers run as another user
    assert place.startswith("/") and origin == "~/.ray/auth_token"
    comments = [line for line in RAY_UP.read_text().splitlines() if line.startswith("#")]
    assert any("ray get-auth-token --generate" in line for line in comments)  # before `ray up`, which copies it
    assert all("RAY_AUTH_MODE=token" in line for line in comments if "ray job submit" in line)


def test_token_is_copied_from_where_ray_generates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication import authentication_token_setup as setup

    monkeypatch.setenv("HOME", str(tmp_path))
    setup.generate_and_save_token()
    assert len((tmp_path / ".ray/auth_token").read_text()) >= 32
    assert setup.AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"


def test_dashboard_is_reached_through_the_head_alone(ray_up: dict[str, Any]) -> None:
    (start,) = [line for line in ray_up["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in shlex.split(start)


def test_commands_of_the_cluster_files_and_of_the_reproduction_exist() -> None:
    comments = "\n".join(line.lstrip("# ") for line in RAY_UP.read_text().splitlines())
    text = "\n".join([*blocks("", REPRODUCE), comments]).replace("\\\n", " ")
    commands = re.findall(rf"nsnet ({'|'.join(cli.COMMANDS)}) (s3://.*|univfd.*)$", text, re.MULTILINE)
    assert len(commands) >= 10
    for name, arguments in commands:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        options = command.make_context(name, shlex.split(arguments)).params
        for variant in options.get("variants") or ():
            recipes.variant(recipes.VIT_L_14, variant)


# The guide says what works.


def blocks(language: str, guide: Path = GUIDE) -> list[str]:
    """The code blocks of a guide in a language, without their indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", guide.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, name, block in found if name == language]


def test_commands_of_the_guide_exist() -> None:
    text = "\n".join(blocks("")).replace("\\\n", " ")
    commands = re.findall(r"(?:nsnet |python -m jobs\.)(score|evaluate|caption) (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for name, arguments in commands:
        command = cli.group.get_command(click.Context(cli.group), name)
        assert command is not None
        command.make_context(name, shlex.split(arguments, comments=True))


def test_options_of_the_guide_exist() -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    others = {"--from", "--from-env-file", "--generate", "--runtime-env-json", "--prefix-list-id"}  # of others
    commands = [cli.group.get_command(click.Context(cli.group), name) for name in cli.COMMANDS]
    parts = [
        part
        for command in commands
        if command is not None
        for part in (command.commands.values() if isinstance(command, click.Group) else [command])
    ]
    known = {option for part in parts for parameter in part.params for option in parameter.opts}
    assert set(re.findall(r"(?<=[`( ])--[a-z0-9-]+", prose)) <= known | others


def test_queries_of_the_guide_run_on_published_verdicts(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    uris = [f"s3://incoming/{i}.jpg" for i in range(4)]
    publish(out, "20260101T000000Z-aaaaaa", "OLD", [verdict_row(uri, 0.1) for uri in uris])
    publish(out, "20260102T000000Z-bbbbbb", "NEW", [verdict_row(uri, None) for uri in uris])
    publish(out, "20260103T000000Z-cccccc", "NEW", [verdict_row(uri, 0.9) for uri in uris[:3]])
    publish(out, "20260103T000001Z-eeeeee", "NEW", [], unread=["/cut.tar ends too early"])  # nothing was to be done
    cut = publish(out, "20260104T000000Z-dddddd", "NEW", [verdict_row(uri, 0.1) for uri in uris])
    writing.remove_file(cut.record)
    sql = "\n".join(blocks("sql")).replace("s3://example-verdicts/incoming", out)
    statements = [statement for statement in sql.split(";") if statement.strip()]
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as database:
        *_, unread, over_budget, failing, stated = [database.execute(statement).fetchall() for statement in statements]
    assert unread == [("/cut.tar ends too early",)]
    assert [run_id for run_id, *_ in over_budget] == ["20260102T000000Z-bbbbbb"]
    assert failing == [("decode", "ImageCorruptError", 1, uris[3])]
    assert stated == [(None, None, None, "real", 4), (None, None, None, "fake", 3)]


def test_query_of_the_reference_gives_the_newest_verdicts_of_published_runs(tmp_path: Path) -> None:
    out = str(tmp_path / "verdicts")
    publish(out, "20260101T000000Z-aaaaaa", "A", [verdict_row(uri, 0.1) for uri in ("/0.jpg", "/1.jpg")])
    publish(out, "20260102T000000Z-bbbbbb", "A", [verdict_row("/1.jpg", 0.9)])
    publish(out, "20260102T000001Z-eeeeee", "A", [])  # nothing was to be done
    cut = publish(out, "20260103T000000Z-cccccc", "A", [verdict_row("/0.jpg", 0.9)])
    writing.remove_file(cut.record)
    (sql,) = blocks("sql", REPO_ROOT / "docs/reference/storage.md")
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as database:
        setting, query, _ = sql.replace("'verdicts/", f"'{out}/").split(";")
        database.execute(setting)
        rows = database.sql(query).project("uri, prob_fake").fetchall()
    assert sorted(rows) == [("/0.jpg", 0.1), ("/1.jpg", 0.9)]


def publish(out: str, run_id: str, detector_id: str, rows: list[dict[str, Any]], **details: Any) -> Run:
    """Publish rows as a run of a detector."""
    run = Run(out=out, run_id=run_id)
    Path(run.staging).mkdir(parents=True)
    manifest, staged = f"{run.staging}/manifest.parquet", f"{run.staging}/rows.parquet"
    pq.write_table(manifest_table(*(manifest_row(row["uri"]) for row in rows)), manifest)
    pq.write_table(verdict_table(*({**row, "run_id": run_id, "detector_id": detector_id} for row in rows)), staged)
    run.publish(manifest, [staged], {"detector_id": detector_id, "attempts": 1, **details})
    return run
