"""`nsnet weights`, and commands that load from a mirror while the hub is out of reach."""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.console import output
from jobs.dataset import schema
from jobs.experiments.request import TrainRequest
from jobs.pipeline.actors import Caption
from jobs.pipeline.models import Models
from jobs.pipeline.scoring import Judge, Scorer
from jobs.runs.execution import Request
from jobs.storage import bundles, mirror
from jobs.storage.uris import Uri
from jobs.workflows import caption, evaluate, score, weights
from jobs.workflows.caption import features_id
from jobs.workflows.streams import _captioning_detector
from nsnet import captions, clip_weights, published, recipes
from nsnet.bundle import DESCRIPTION
from nsnet.configuration import CaptionerConfig
from nsnet.detector import Detector
from nsnet.errors import BundleError, WeightsError
from tests.support import hub, models
from tests.support.tables import image_file, put, run_command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub, a bundle that refers to the models in it, and a mirror of them."""
    folder = tmp_path_factory.mktemp("mirror")
    hub.fill(folder / "hub", folder / "made")
    hub.referring_bundle(folder / "bundle", folder / "made")
    with hub.offline(folder / "hub"):
        weights.mirror_models(to=Uri(str(folder / "mirror")), detectors=[Uri(str(folder / "bundle"))])
    return folder


@pytest.fixture(autouse=True)
def away(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the hub nor its cache is there."""
    monkeypatch.setenv("NSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NSNET_WEIGHTS", raising=False)
    with hub.offline(tmp_path / "empty"):
        yield


@pytest.fixture
def images(tmp_path: Path) -> str:
    return put(str(tmp_path / "images"), {f"{i}.png": image_file(i) for i in range(2)})


def fetched(tmp_path: Path) -> list[str]:
    """Names of the files in the cache of this node."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and "locks" not in path.parts)


def test_mirror_says_what_it_copied_and_check_that_all_is_there(made: Path) -> None:
    target = str(made / "again")
    with hub.offline(made / "hub"):
        code, out, err = run_command("weights", "mirror", "--to", target, "--detector", str(made / "bundle"))
        assert code == 0 and err == f"use it with --weights {target}, or NSNET_WEIGHTS={target}\n"
        lines = out.splitlines()
        assert len(lines) == 2 and all(": copied " in line for line in lines)
        assert lines[0].startswith(f"clip ViT-B-32-quickgelu:openai at {hub.CLIP_REVISION}, 1 files")
        assert f"captioner {hub.BLIP_REPOSITORY}@{hub.BLIP_REVISION}, " in lines[1] and ".bin" not in out
        code, out, _ = run_command("weights", "mirror", "--to", target, "--detector", str(made / "bundle"))
        assert code == 0 and [line.rpartition(": ")[2] for line in out.splitlines()] == ["already there"] * 2
    for arguments in ([], ["--quick"], ["--detector", str(made / "bundle")]):
        code, out, _ = run_command("weights", "check", target, *arguments)
        assert code == 0 and out.count("complete") == 2
    digest = hashlib.sha256((made / "bundle" / DESCRIPTION).read_bytes()).hexdigest()
    assert f"--detector-sha256 {digest}" in out


def test_check_names_what_is_damaged_or_missing(made: Path, tmp_path: Path) -> None:
    place = Uri(str(tmp_path / "mirror"))
    with hub.offline(made / "hub"):
        weights.mirror_models(to=place, detectors=[Uri(str(made / "bundle"))])
    tower = next(mirror.read_entry(uri) for uri in mirror.descriptions(place) if "clip--" in uri)
    (file,) = tower.files.values()
    path = Path(mirror.file_uri(place, file))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    code, out, err = run_command("weights", "check", place)
    assert code == 2 and out.count("complete") == 1
    for text in (out, err):
        assert f"open_clip_model.safetensors of {tower.model} ({path}) has the SHA-256 {found}" in text
        assert f"expected {file.sha256}" in text
    assert run_command("weights", "check", place, "--quick")[0] == 0, "the size is right"
    path.write_bytes(content[:-1])
    code, out, _ = run_command("weights", "check", place, "--quick")
    assert code == 2 and f"has {len(content) - 1:,} bytes, expected {len(content):,}" in out
    path.unlink()
    code, out, _ = run_command("weights", "check", place)
    assert code == 2 and f"({path}) is missing" in out
    Path(mirror.description_uri(place, tower.model)).unlink()
    assert run_command("weights", "check", place)[0] == 0, "what is described is there"
    code, out, err = run_command("weights", "check", place, "--detector", str(made / "bundle"))
    assert code == 2 and "clip ViT-B-32-quickgelu:openai is missing" in err
    code, _, err = run_command("weights", "check", str(tmp_path / "nothing"))
    assert code == 2 and "holds no mirror" in err


def test_paths_take_the_place_of_the_hub_for_one_recipe(made: Path, tmp_path: Path) -> None:
    tower, blip = made / "made/open_clip_model.safetensors", made / "made/blip"
    given = ["--clip-weights", str(tower), "--captioner", str(blip)]
    named = ["--recipe", "ViT-B-32-quickgelu:openai"]
    code, out, err = run_command("weights", "mirror", "--to", str(tmp_path / "m"), *named, *given)
    assert code == 0, err
    assert out.splitlines()[0].startswith("clip ViT-B-32-quickgelu:openai, 1 files")
    before, after = ({path.name for path in (place / "files").iterdir()} for place in (made / "mirror", tmp_path / "m"))
    assert before == after
    code, _, err = run_command("weights", "mirror", "--to", str(tmp_path / "m"), *named, "--recipe", "vit-l-14", *given)
    assert code == 2 and "belong to one recipe" in err
    code, _, err = run_command("weights", "mirror", "--to", str(tmp_path / "m"), "--recipe", "tiny")
    assert code == 2 and "no published weights" in err
    code, _, err = run_command("weights", "mirror", "--to", str(tmp_path / "m"))
    assert code == 2 and "hf download timm/vit_large_patch14_clip_224.openai" in err


def test_predict_loads_from_the_mirror_what_the_bundle_refers_to(made: Path, images: str, tmp_path: Path) -> None:
    arguments = ["predict", f"{images}/0.png", "--detector", str(made / "bundle"), "--json"]
    code, _, err = run_command(*arguments)
    assert code == 2 and "hf download" in err, "without a mirror the weights are missing"
    code, out, err = run_command(*arguments, "--weights", str(made / "mirror"))
    assert code == 0, err
    with hub.offline(made / "hub"):
        (expected,) = Detector.load(made / "bundle").predict([f"{images}/0.png"])
    verdict = json.loads(out)
    assert verdict["prob_fake"] == pytest.approx(expected.prob_fake, abs=1e-6)
    assert verdict["caption"] == expected.caption
    assert "open_clip_model.safetensors" in fetched(tmp_path) and "model.safetensors" in fetched(tmp_path)


def test_variable_names_the_mirror_and_the_option_goes_before_it(
    made: Path, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["predict", f"{images}/0.png", "--detector", str(made / "bundle")]
    monkeypatch.setenv("NSNET_WEIGHTS", str(made / "mirror"))
    assert run_command(*arguments)[0] == 0
    code, _, err = run_command(*arguments, "--weights", str(tmp_path / "other"))
    assert code == 2
    assert f"the mirror {tmp_path}/other does not hold captioner {hub.BLIP_REPOSITORY}@" in err
    assert f"nsnet weights mirror --to {tmp_path}/other --detector {made}/bundle" in err


def test_missing_model_is_named_with_what_provides_it(tmp_path: Path) -> None:
    """No recipe provides the captioner of another repository."""
    own = Models(weights=Uri("s3://m"))
    other = CaptionerConfig(model="someone/blip")
    for model, parts in (
        (published.captioner(CaptionerConfig()), ["nsnet weights mirror --to s3://m --recipe vit-l-14"]),
        (published.tower(hub.REFERRING.clip), ["--recipe ViT-B-32-quickgelu:openai"]),
        (published.captioner(other), ["with --captioner", "nsnet weights mirror --to s3://m --detector URI"]),
    ):
        assert model is not None
        assert all(part in own._remedy(model) for part in parts)
    with pytest.raises(WeightsError, match=r"someone/blip@main: give its folder with --captioner") as caught:
        Models(weights=Uri(str(tmp_path))).captioner_folder(other)
    assert "--recipe" not in models.one_line(caught.value)


def test_path_goes_before_the_mirror(made: Path, tmp_path: Path) -> None:
    place, path = Uri(str(made / "mirror")), Uri(str(made / "made/open_clip_model.safetensors"))
    given = Models(weights=place, clip_weights=path, captioner=Uri(str(made / "made/blip")))
    assert given.tower_paths(hub.REFERRING)["clip_weights"] == Path(path)
    assert given.captioner_folder(hub.REFERRING.captioner) == made / "made/blip"
    assert fetched(tmp_path) == []


def test_process_that_waits_for_another_says_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Models(weights=Uri(str(made / "mirror")))
    path = own.clip_path(hub.REFERRING)
    assert path is not None
    (lock,) = (tmp_path / "cache/locks").iterdir()
    path.unlink()  # so that it must be fetched again
    monkeypatch.setattr(output, "WAITING_SECONDS", 0.01)
    said = ""
    with ThreadPoolExecutor(1) as pool, lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the process that fetches
        waiting = pool.submit(own.clip_path, hub.REFERRING)
        while f"{own.weights}, which one process of each node fetches" not in said and not waiting.done():
            said += capfd.readouterr().err
        assert not waiting.done() and not path.exists()
        fcntl.flock(file, fcntl.LOCK_UN)
        assert waiting.result(60) == path and path.exists()
    assert "waiting for clip ViT-B-32-quickgelu:openai from" in said


def test_bundle_that_holds_its_models_needs_none_of_the_mirror(made: Path, tmp_path: Path) -> None:
    models.as_if_trained().save(tmp_path / "whole", captioner=made / "made/blip")
    own = Models(weights=Uri(str(tmp_path / "nowhere")), detector=Uri(str(tmp_path / "whole")))
    own.check_towers(models.FROZEN)
    assert own.tower_paths() == {"clip_weights": None, "text_weights": None}
    assert own.captioner_folder(hub.REFERRING.captioner) == tmp_path / "whole/captioner"


def test_identities_are_those_of_the_hub(made: Path, tmp_path: Path) -> None:
    """So captions and features of one are reused with the other."""
    config, place = hub.REFERRING, Uri(str(made / "mirror"))

    def ids(models: Models) -> list[str]:
        folder = models.captioner_folder(config.captioner)
        return [
            captions.captioner_id(config.captioner, folder),
            clip_weights.text_tower_id(*models.text_tower(config)),
            features_id(config, models),
        ]

    from_mirror = ids(Models(weights=place))
    with hub.offline(made / "hub"):
        assert ids(Models()) == from_mirror
    by_path = Models(
        clip_weights=Uri(str(made / "made/open_clip_model.safetensors")), captioner=Uri(str(made / "made/blip"))
    )
    assert ids(by_path) == from_mirror


def test_place_of_the_mirror_is_no_part_of_an_identity(
    made: Path, images: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings: list[dict[str, Any]] = []

    def keep(request: Request, make: object) -> dict[str, Any]:
        settings.append(request.identity())
        return {}

    monkeypatch.setattr(caption, "carry_out", keep)
    monkeypatch.setattr(recipes, "get", lambda name: replace(recipes.TINY, detector=hub.REFERRING))
    for place in (made / "mirror", made / "mirror2"):
        if not place.exists():
            place.symlink_to(made / "mirror")
        caption.caption(Uri(images), out=Uri(str(tmp_path / "out")), weights=Uri(str(place)))
    assert settings[0] == settings[1] and "weights" not in settings[0]
    requests = [TrainRequest(source=Uri(images), out=Uri("/o"), weights=place) for place in (None, Uri("/m"))]
    assert len({json.dumps(request.identity(recipes.TINY)) for request in requests}) == 1


def test_worker_of_a_training_builds_from_the_mirror(made: Path) -> None:
    from jobs.training import worker

    training = replace(recipes.TINY.training, activation_checkpointing=False)
    given: Any = {"clip_weights": None, "text_weights": None, "seed": 0, "fitted": None}
    network = worker._build(SimpleNamespace(**given, weights=Uri(str(made / "mirror"))), hub.REFERRING, training)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in network.parameters())
    with pytest.raises(WeightsError, match="hf download"):
        worker._build(SimpleNamespace(**given, weights=None), hub.REFERRING, training)  # type: ignore[arg-type]


def test_stages_of_an_actor_load_from_the_mirror_and_only_the_pinned_bundle(made: Path) -> None:
    detector = Uri(str(made / "bundle"))
    own = Models(weights=Uri(str(made / "mirror")), detector=detector)
    judge = Judge(detector=detector, detector_id=None, run_id=None, detector_sha256=pin_of(made / "bundle"))
    assert Scorer(own, judge, 2).detector.config == hub.REFERRING
    report: Any = None
    stage = Caption(own, hub.REFERRING.captioner, schema.TODO, 2, report)
    assert stage.captioner.thumbnail_px == captions.TINY_SIDE_PX
    with pytest.raises(BundleError, match="detector-sha256 pins"):
        _ = Scorer(own, replace(judge, detector_sha256="0" * 64), 2).detector


def test_scoring_checks_the_mirror_before_it_starts(made: Path, tmp_path: Path) -> None:
    own = Models(weights=Uri(str(made / "mirror")), detector=Uri(str(made / "bundle")))
    own.check_towers(hub.REFERRING)
    assert fetched(tmp_path) == [], "the process that plans does not fetch what only workers load"
    _captioning_detector([(own, hub.REFERRING)])
    assert "config.json" in fetched(tmp_path) and "open_clip_model.safetensors" not in fetched(tmp_path)
    with pytest.raises(WeightsError, match="does not hold clip"):
        replace(own, weights=Uri(str(tmp_path / "other"))).check_towers(hub.REFERRING)
    shutil.copytree(made / "mirror/models", tmp_path / "half/models")
    with pytest.raises(WeightsError, match=r"open_clip_model\.safetensors .* is missing"):
        replace(own, weights=Uri(str(tmp_path / "half"))).check_towers(hub.REFERRING)


def test_mirror_with_other_weights_than_the_bundle_records_is_refused(made: Path, images: str, tmp_path: Path) -> None:
    """The mirror is consistent, but the bundle names the digest of its tower."""
    other = hub.tower_file(tmp_path, seed=5)
    options = ["--detector", str(made / "bundle"), "--clip-weights", str(other), "--captioner", str(made / "made/blip")]
    assert run_command("weights", "mirror", "--to", str(tmp_path / "m"), *options)[0] == 0
    code, _, err = run_command(
        "predict", f"{images}/0.png", "--detector", str(made / "bundle"), "--weights", str(tmp_path / "m")
    )
    assert code == 2 and "are not those that detector" in err


# Pinned bundles.


def pin_of(bundle: Path) -> str:
    return hashlib.sha256((bundle / DESCRIPTION).read_bytes()).hexdigest()


def test_pinned_bundle_is_used_and_another_refused_before_anything_is_loaded(
    made: Path, images: str, no_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = str(made / "bundle")
    pinned = ["--detector", bundle, "--detector-sha256"]
    code, _, err = run_command(
        "predict", f"{images}/0.png", *pinned, pin_of(made / "bundle").upper(), "--weights", str(made / "mirror")
    )
    assert code == 0, err
    monkeypatch.setattr(Detector, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    wrong = "0" * 64
    for command in (
        ["predict", f"{images}/0.png"],
        ["score", images, "--out", str(tmp_path / "out")],
        ["evaluate", images, "--out", str(tmp_path / "out")],
    ):
        code, out, err = run_command(*command, *pinned, wrong)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1
        assert f"{pin_of(made / 'bundle')}, not {wrong}" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["", "abc", "0" * 63, "0" * 65, "g" * 64, "0" * 32])
def test_pin_that_is_no_sha256_is_refused(value: str, made: Path) -> None:
    code, _, err = run_command("predict", "x.png", "--detector", str(made / "bundle"), "--detector-sha256", value)
    assert code == 2 and "is not a SHA-256 of 64 hexadecimal digits" in err


def test_pins_belong_to_detectors_in_their_order(made: Path, images: str, no_cluster: None, tmp_path: Path) -> None:
    models.as_if_trained(seed=1).save(tmp_path / "second")
    first, second = made / "bundle", tmp_path / "second"
    both = ["score", images, "--out", str(tmp_path / "out"), "--detector", str(first), "--detector", str(second)]
    code, _, err = run_command(*both, "--detector-sha256", pin_of(first))
    assert code == 2 and "--detector-sha256 was given 1 times for 2 detectors" in err
    swapped = ["--detector-sha256", pin_of(second), "--detector-sha256", pin_of(first)]
    code, _, err = run_command(*both, *swapped)
    assert code == 2 and f"the bundle {first} is not the one" in err
    code, _, err = run_command("evaluate", images, "--out", str(tmp_path / "out"), "--detector-sha256", pin_of(first))
    assert code == 2 and "give that as well" in err


@pytest.mark.parametrize("part", [DESCRIPTION, "network.safetensors"])
def test_worker_refuses_a_bundle_that_was_replaced_after_it_was_pinned(
    part: str, made: Path, tmp_path: Path, place: str
) -> None:
    """Also of one in a bucket, which is fetched by its hash."""
    bundle = Uri(put(place, {path.relative_to(made / "bundle").as_posix(): path.read_bytes()
                             for path in (made / "bundle").rglob("*.*")}))  # fmt: skip
    pin = bundles.description_digest(bundle)
    own = Models(detector=bundle, detector_sha256=pin)
    assert own.bundle_folder().is_dir()
    models.as_if_trained(seed=1).save(tmp_path / "other")
    if part == DESCRIPTION:
        put(bundle, {part: (tmp_path / "other" / part).read_bytes()})
        with pytest.raises(BundleError, match=f"not the one that --detector-sha256 pins.*{re.escape(pin)}"):
            own.bundle_folder()
    else:
        put(bundle, {part: (tmp_path / "other" / part).read_bytes()})
        if "://" in bundle:
            assert (own.bundle_folder() / part).read_bytes() == (made / "bundle" / part).read_bytes(), "cached"
        else:
            with pytest.raises(BundleError, match="is damaged"):
                Detector.load(own.bundle_folder(), captioner=False)


@pytest.fixture
def replaced(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Uri, str]:
    """A bundle on a disk and its pin; another bundle takes its place as soon as it was found."""
    folder, other, fetch = tmp_path / "bundle", tmp_path / "other", bundles.fetch_bundle
    models.as_if_trained().save(folder)
    models.as_if_trained(seed=1).save(other)

    def fetch_and_replace(uri: str, description: str, sha256: str | None = None) -> Path:
        found = fetch(uri, description, sha256)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        return found

    monkeypatch.setattr(bundles, "fetch_bundle", fetch_and_replace)
    return Uri(str(folder)), pin_of(folder)


def test_predict_refuses_a_bundle_that_is_replaced_after_its_pin_was_compared(
    replaced: tuple[Uri, str], made: Path, images: str
) -> None:
    detector, pin = replaced
    given = ["--detector", detector, "--detector-sha256", pin, "--captioner", str(made / "made/blip")]
    code, out, err = run_command("predict", f"{images}/0.png", *given)
    assert (code, out) == (2, "") and "is not the one that --detector-sha256 pins" in err


@pytest.mark.parametrize("reader", ["score", "evaluate", "worker", "towers"])
def test_the_description_that_is_parsed_is_the_one_that_is_pinned(reader: str, replaced: tuple[Uri, str]) -> None:
    detector, pin = replaced
    judge = Judge(detector=detector, detector_id=None, run_id=None, detector_sha256=pin)
    with pytest.raises(BundleError, match="is not the one that --detector-sha256 pins"):
        if reader == "score":
            score._identified([detector], [pin])
        elif reader == "evaluate":
            evaluate._bundle_id(detector, pin)
        elif reader == "worker":
            _ = Scorer(Models(), judge, 2).detector
        else:
            Models(detector=detector, detector_sha256=pin).description()


def test_captioner_in_a_pinned_bundle_cannot_be_replaced(made: Path, tmp_path: Path) -> None:
    """A worker may load it without the detector."""
    folder = tmp_path / "bundle"
    models.as_if_trained().save(folder, captioner=made / "made/blip")
    own = Models(detector=Uri(str(folder)), detector_sha256=pin_of(folder))
    config = models.FROZEN.captioner
    assert own.captioner_folder(config) == folder / "captioner"
    with (folder / "captioner/config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(BundleError, match=r"damaged: the SHA-256 of captioner/config\.json"):
        own.captioner_folder(config)
