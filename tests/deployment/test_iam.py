"""The policies for the buckets allow what the storage code calls, and nothing beyond the buckets that are named."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient

from jobs.storage import listing, probes, reading, writing
from tests.support.manifests import CLUSTER, values
from tests.support.swift import SwiftServer
from tests.support.tables import new_bucket

POLICIES = {path.stem: json.loads(path.read_text()) for path in (CLUSTER / "iam").iterdir()}
READ = {"s3:ListBucket", "s3:GetObject"}
WRITE = {*READ, "s3:PutObject", "s3:AbortMultipartUpload", "s3:DeleteObject"}
PLACES = {
    "source-read": ("SOURCE",),
    "detector-read": ("DETECTOR",),
    "output-write": ("OUT",),
    "train-source-read": ("TRAIN_SOURCE",),
    "captions-read": ("TRAIN_CAPTIONS",),
    "training-write": ("TRAIN_OUT", "TRAIN_OUT.training"),
}
"""The value whose place a policy is for. That of `weights-read` is empty as shipped."""
ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
}
"""The action that S3 asks for, of each call."""


def allows(policy: dict[str, Any], call: str, parameters: dict[str, Any]) -> bool:
    """Whether a policy allows a call."""
    name = f"arn:aws:s3:::{parameters['Bucket']}"
    wanted = f"{name}/{parameters['Key']}" if "Key" in parameters else name
    for statement in policy["Statement"]:
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])
        if (
            ACTIONS[call] in statement["Action"]
            and any(fnmatchcase(wanted, resource) for resource in statement["Resource"])
            and any(fnmatchcase(parameters.get("Prefix", ""), prefix) for prefix in prefixes)
        ):
            return True
    return False


def place(name: str) -> tuple[str, str]:
    """Bucket and key of a value, or of what lies beside it."""
    key, _, suffix = name.partition(".")
    bucket, _, prefix = values()[key].removeprefix("s3://").partition("/")
    return bucket, f"{prefix}.{suffix}" if suffix else prefix


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policy_grants_the_least_and_only_in_its_bucket(name: str) -> None:
    policy = POLICIES[name]
    assert set(policy) == {"Version", "Statement"} and policy["Version"] == "2012-10-17"
    granted: set[str] = set()
    buckets = set()
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and "NotAction" not in statement and "NotResource" not in statement
        granted |= {*statement["Action"]}
        for resource in statement["Resource"]:
            bucket, slash, key = resource.removeprefix("arn:aws:s3:::").partition("/")
            buckets.add(bucket)
            assert "*" not in bucket and "?" not in bucket
            assert (statement["Action"] == ["s3:ListBucket"]) == (not slash)  # a list is of a bucket, all else of keys
            assert key.count("*") <= 1 and (not slash or key.endswith("*"))
    assert granted == (WRITE if name.endswith("-write") else READ) and len(buckets) == 1


@pytest.mark.parametrize("name", sorted(PLACES))
def test_policy_is_for_the_place_of_its_value_and_not_for_what_lies_beside_it(name: str) -> None:
    policy = POLICIES[name]
    for value in PLACES[name]:
        bucket, prefix = place(value)
        if "example" not in bucket:
            pytest.skip("the values are not those that are shipped")
        key = f"{prefix}/a" if prefix else "a"
        assert allows(policy, "GetObject", {"Bucket": bucket, "Key": key})
        assert allows(policy, "ListObjectsV2", {"Bucket": bucket, "Prefix": prefix})
        assert allows(policy, "ListObjectsV2", {"Bucket": bucket, "Prefix": key})
        assert allows(policy, "PutObject", {"Bucket": bucket, "Key": key}) == name.endswith("-write")
        assert not allows(policy, "GetObject", {"Bucket": f"{bucket}2", "Key": key})
        if prefix:
            assert not allows(policy, "GetObject", {"Bucket": bucket, "Key": f"{prefix}-other/a"})
            assert not allows(policy, "ListObjectsV2", {"Bucket": bucket, "Prefix": ""})


def test_every_policy_has_a_place() -> None:
    assert set(POLICIES) == {*PLACES, "weights-read"}


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The calls to S3 during a block."""
    calls: list[tuple[str, dict[str, Any]]] = []
    make = AioBaseClient._make_api_call

    async def record(self: Any, name: str, parameters: dict[str, Any]) -> Any:
        calls.append((name, parameters))
        return await make(self, name, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(AioBaseClient, "_make_api_call", record)
        yield calls


def moved(policy: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """The policy for another bucket."""
    text = json.dumps(policy).replace(f"arn:aws:s3:::{before}", f"arn:aws:s3:::{after}")
    found: dict[str, Any] = json.loads(text)
    return found


def test_policies_allow_what_the_storage_code_calls(
    s3_environment: SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket().removeprefix("s3://").partition("/")[0]
    out, part = f"s3://{bucket}/incoming", tmp_path / "part-0.parquet"
    part.write_bytes(b"0")
    with recorded(monkeypatch) as writes:
        probes.check_output(out)
        assert writing.create(f"{out}/locks/1.json", b"1") and not writing.create(f"{out}/locks/1.json", b"2")
        writing.write_bytes(f"{out}/staging/run.json", b"{}")
        writing.upload_file(part, f"{out}/verdicts/part-0.parquet")
        writing.age_seconds(f"{out}/locks/1.json")
        writing.remove_file(f"{out}/locks/1.json")
    with recorded(monkeypatch) as reads:
        probes.reachable(out)
        assert listing.exists(f"{out}/staging/run.json") and not listing.exists(f"{out}/locks/1.json")
        assert listing.is_folder(out) and listing.subfolders(out) == ["staging", "verdicts"]
        (entry,) = [entry for entry in listing.list_files(out) if entry.uri.endswith(".json")]
        reading.read_bytes(entry.uri)
        reading.fetch(entry.uri, etag=entry.etag)
    names = {name for name, _ in (*reads, *writes)}
    assert {"ListObjectsV2", "GetObject", "HeadObject", "PutObject", "DeleteObject"} <= names <= set(ACTIONS)
    write = moved(POLICIES["output-write"], "example-verdicts", bucket)
    read = {"Version": "2012-10-17", "Statement": [
        {**statement, "Action": [action for action in statement["Action"] if action in READ]}
        for statement in write["Statement"]
    ]}  # fmt: skip
    key = {"Bucket": bucket, "Key": "incoming/verdicts/part-0.parquet"}
    parts = [(name, key) for name in ACTIONS if "Part" in name or "Multipart" in name]  # a file over 100 MiB
    assert [call for call in (*writes, *parts) if not allows(write, *call)] == []
    assert [call for call in reads if not allows(read, *call)] == []
