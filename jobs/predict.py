"""`nsnet predict`: verdicts on single pictures, in this process, without Ray."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from jobs.console import main, output, parameters
from jobs.storage import errors, listing, probes, reading, uris
from nsnet.errors import FetchError, ImageError, ImageTooLargeError, UsageError
from nsnet.preparation import Prepared


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--detector", required=True, help="Detector bundle: a folder or s3:// URI.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per picture, on a line of its own.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one.")
@parameters.weights_options
@parameters.limit_options
def command(images: tuple[str, ...], **options: Any) -> int:
    """Judge one or more pictures (paths or s3:// URIs), each with its reasons.

    Exit code 3 when a picture could not be judged.
    """
    import torch

    from jobs.pipeline.decoding import GuardedDecoder
    from jobs.pipeline.models import Models
    from nsnet.detector import Detector

    limits = parameters.limits_from(options)
    gpu = torch.cuda.is_available()
    if options["device"] == "cuda" and not gpu:
        raise UsageError("--device cuda: this machine has no usable GPU; leave it out to compute on the CPU")
    uri = uris.absolute(options["detector"])
    probes.reachable(uri)
    models = Models(
        detector=uri,
        clip_weights=uris.model_path(options["clip_weights"]),
        captioner=uris.model_path(options["captioner"]),
        device=options["device"] or ("cuda" if gpu else "cpu"),
    )
    detector = Detector.load(
        models.bundle_folder(),
        device=models.device,
        clip_weights=models.clip_path(),
        captioner=Path(models.captioner) if models.captioner else None,
    )
    if detector.description and detector.description.note:
        output.say(detector.description.note)
    decoder = GuardedDecoder(detector.preparation(limits))
    failures = 0
    try:
        for image in images:
            try:
                picture: Prepared | ImageError = decoder.prepare(_read(image, limits.max_bytes))
            except ImageError as error:
                picture = error
            verdict = detector.predict_prepared([picture])[0]
            failures += verdict.status == "failed"
            values = {"image": image, **dataclasses.asdict(verdict), "detector_id": detector.detector_id}
            if options["as_json"]:
                output.show_json(values)
            else:
                output.show(_text(values))
    finally:
        decoder.close()
    return main.EXIT_TOO_MANY_FAILED if failures else 0


def _read(image: str, max_bytes: int) -> bytes:
    uri = uris.located(image)
    try:
        size = listing.describe(uri).size_bytes
        if size > max_bytes:
            raise ImageTooLargeError(f"{size:,} bytes, the limit is {max_bytes:,} (--max-bytes)")
        return reading.read_bytes(uri)
    except FileNotFoundError as error:
        raise FetchError(f"there is no file {image}") from error
    except ImageError:
        raise
    except Exception as error:  # the per-picture boundary: stores raise many kinds
        raise FetchError(f"{image}: {errors.reason(error)}") from error


def _text(values: dict[str, Any]) -> str:
    """A verdict for people; what comes from the file is shown without control characters."""
    values = {key: output.printable(value) if isinstance(value, str) else value for key, value in values.items()}
    name = values["image"]
    if values["status"] == "failed":
        return f"{name}: not judged: {values['error_class']}: {values['error_message']}"
    text = (
        f"{name}: {values['verdict']}, P(fake) = {values['prob_fake']:.3f} (threshold {values['threshold']:.3f})\n"
        f"  {values['width']} × {values['height']} px {values['format']}"
    )
    if values["caption"] is not None:
        text += (
            f"; caption whose meaning was removed: “{values['caption']}”, {values['residual_energy']:.0%} of the image "
            "feature was left to judge by"
        )
    return text


if __name__ == "__main__":
    main.run(command, "nsnet predict")
