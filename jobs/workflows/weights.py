"""Mirror the published models of recipes and bundles, and check a mirror. Starts no cluster."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.console import output
from jobs.storage import bundles, mirror, probes
from jobs.storage.mirror import Entry, MirroredFile
from jobs.storage.uris import Uri
from nsnet import bundle, published
from nsnet.captions import find_captioner
from nsnet.clip_weights import CLIP_WEIGHTS, TEXT_WEIGHTS, find_weights
from nsnet.configuration import CaptionerConfig, ClipConfig, DetectorConfig, config_of
from nsnet.digest import file_digest
from nsnet.errors import ConfigError, WeightsError
from nsnet.published import DEFAULT_RECIPE, Layout, PublishedModel


def mirror_models(
    *,
    to: Uri,
    recipes: Sequence[str] = (),
    detectors: Sequence[Uri] = (),
    clip_weights: Uri | None = None,
    text_weights: Uri | None = None,
    captioner: Uri | None = None,
) -> list[PublishedModel]:
    """Copy every published model of recipes and bundles to a mirror; returns their names.

    `clip_weights`, `text_weights`, `captioner`: local paths instead of the hub, for one recipe or bundle only.
    """
    given = {bundle.CLIP: clip_weights, bundle.TEXT: text_weights, bundle.CAPTIONER: captioner}
    recipes = recipes or (() if detectors else (DEFAULT_RECIPE,))
    if any(given.values()) and len(recipes) + len(detectors) > 1:
        raise ConfigError(
            "local paths of weights belong to one recipe: give a single --recipe or --detector with them, and mirror "
            "the others by commands of their own"
        )
    needed = _needed(recipes, detectors)
    if not needed:
        raise ConfigError(f"{', '.join([*recipes, *detectors])}: these use no published weights; nothing to mirror")
    probes.check_output(to)
    for model, (part, config) in needed.items():
        path = given[part]
        with tempfile.TemporaryDirectory(prefix="nsnet-mirror-") as scratch:
            layout = _lay_out(config, part, Path(path) if path else None, Path(scratch))
            entry = Entry(model=model, revision=layout.revision, files=_described(layout), origin=layout.origin)
            with output.waiting(f"the upload of {model} to {to}"):
                copied = [name for name, was_copied in mirror.upload(to, entry, layout.files) if was_copied]
        output.show(f"{_summary(entry)}: {'copied ' + ', '.join(copied) if copied else 'already there'}")
    output.say(f"use it with --weights {to}, or NSNET_WEIGHTS={to}")
    return list(needed)


def check_mirror(
    uri: Uri, *, recipes: Sequence[str] = (), detectors: Sequence[Uri] = (), quick: bool = False
) -> list[Entry]:
    """Print a line for each model of a mirror, or of recipes and bundles; returns the complete ones.

    `quick`: compare sizes only. Raises `WeightsError` if a model is missing or damaged, or if there is none.
    """
    probes.reachable(uri)
    if recipes or detectors:
        places: dict[Uri, PublishedModel | None] = {
            mirror.description_uri(uri, model): model for model in _needed(recipes, detectors)
        }
    else:
        places = dict.fromkeys(mirror.descriptions(uri))
        if not places:
            raise WeightsError(f"{uri} holds no mirror: run nsnet weights mirror --to {uri}")
    complete: list[Entry] = []
    failures: list[str] = []
    for place, model in places.items():
        try:
            entry = mirror.read_entry(place, model)
            if mirror.description_uri(uri, entry.model) != place:
                raise WeightsError(f"{place} describes {entry.model}, which has another name there: {mirror.REMEDY}")
            with output.waiting(f"the check of {entry.model}"):
                problems = _problems(uri, entry, quick)
        except FileNotFoundError:
            problems = [f"{model} is missing: there is no {place}"]
        except WeightsError as error:
            problems = [str(error)]
        if problems:
            failures += problems
            output.show("\n".join(problems))
        else:
            complete.append(entry)
            output.show(f"{_summary(entry)}: complete{' (sizes only)' if quick else ''}")
    for detector in detectors:
        output.show(f"detector {detector}: --detector-sha256 {bundles.description_digest(detector)}")
    if failures:
        raise WeightsError(f"the mirror {uri} is not complete: {failures[0]}{_further(failures)}")
    return complete


def _further(failures: Sequence[str]) -> str:
    return f" (and {len(failures) - 1} more, listed above)" if len(failures) > 1 else ""


def _problems(uri: Uri, entry: Entry, quick: bool) -> list[str]:
    """What is wrong with the files of a model, each with the file, what was expected and what was found."""
    problems = []
    for name, file in entry.files.items():
        place = mirror.file_uri(uri, file)
        named, size = f"{name} of {entry.model} ({place})", mirror.size_of(place)
        if size is None:
            problems.append(f"{named} is missing: run nsnet weights mirror again")
        elif size != file.size_bytes:
            problems.append(f"{named} has {size:,} bytes, expected {file.size_bytes:,}: run nsnet weights mirror again")
        elif not quick and (digest := mirror.digest_of(place)) != file.sha256:
            problems.append(f"{named} has the SHA-256 {digest}, expected {file.sha256}: {mirror.REMEDY}")
    return problems


def _summary(entry: Entry) -> str:
    origin = f" at {entry.revision}" if entry.revision and entry.revision != entry.model.version else ""
    return f"{entry.model}{origin}, {len(entry.files)} files, {entry.size_bytes / 1e6:,.1f} MB"


def _described(layout: Layout) -> dict[str, MirroredFile]:
    return {
        name: MirroredFile(size_bytes=path.stat().st_size, sha256=file_digest(path))
        for name, path in sorted(layout.files.items())
    }


Needed = dict[PublishedModel, tuple[str, ClipConfig | CaptionerConfig]]
"""Published model -> the part of a detector that it is, and that part's configuration."""


def _needed(recipes: Sequence[str], detectors: Sequence[Uri]) -> Needed:
    """Published models of recipes, and of bundles that do not hold them."""
    from nsnet import recipes as named  # imports open_clip for most names

    needed: Needed = {}
    for name in recipes:
        needed |= _parts(named.get(name).detector, None)
    for detector in detectors:
        probes.reachable(detector)
        folder = bundles.fetch_bundle(detector, bundle.DESCRIPTION)
        needed |= _parts(config_of(bundle.read(folder)), folder)
    return needed


def _parts(config: DetectorConfig, folder: Path | None) -> Needed:
    """The published models of a detector, without those in the folder of its bundle."""
    parts: dict[str, ClipConfig | CaptionerConfig] = {bundle.CLIP: config.clip}
    # a training computes a global basis from captions; a bundle holds it
    if config.projection.needs_captions or (folder is None and config.projection.kind != "none"):
        parts |= {bundle.TEXT: config.text} if config.text is not None else {}
        parts[bundle.CAPTIONER] = config.captioner
    needed: Needed = {}
    for part, own in parts.items():
        model = published.captioner(own) if isinstance(own, CaptionerConfig) else published.tower(own)
        if model is not None and not (folder is not None and (folder / part).is_dir()):
            needed[model] = part, own
    return needed


def _lay_out(config: ClipConfig | CaptionerConfig, part: str, given: Path | None, scratch: Path) -> Layout:
    """Find a model as loading does, and lay it out for the mirror."""
    if isinstance(config, CaptionerConfig):
        folder = find_captioner(config, given)
        assert folder is not None
        return published.lay_out_captioner(folder, scratch)
    found = find_weights(config, given, option=TEXT_WEIGHTS if part == bundle.TEXT else CLIP_WEIGHTS)
    assert found is not None
    return published.lay_out_tower(config, found, scratch)
