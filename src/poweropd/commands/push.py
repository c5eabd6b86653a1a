"""`poweropd push`: a run's student to the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from poweropd.errors import RunError, UsageError


def push(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; created if absent.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    best: Annotated[bool, typer.Option("--best", help="The best student, not the last.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be uploaded.")
    ] = False,
) -> None:
    """Uploads a run's student, with its model card, to the Hugging Face Hub."""
    folder = run / ("best" if best else "final")
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such directory; {_advice(run, best)}")
    if dry_run:
        typer.echo(contents(folder, repo))
    else:
        typer.echo(upload(folder, repo, private))


def contents(folder: Path, repo: str) -> str:
    """Returns what an upload would send: each file with its size, and the model card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.stat().st_size:>14,}  {path.relative_to(folder)}" for path in files]
    card = (folder / "README.md").read_text("utf-8")
    return "\n".join([f"to {repo}, {len(files)} files (bytes, name):", *lines, "", card.rstrip()])


def upload(folder: Path, repo: str, private: bool = False) -> str:
    """Uploads a model directory as one commit; returns the address of the repository."""
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.get_token() is None:
        raise UsageError("no login at the Hub: run `hf auth login`, or set HF_TOKEN")
    try:
        url = huggingface_hub.create_repo(repo, private=private, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message="Student trained by poweropd"
        )
    except errors.HFValidationError as error:
        raise UsageError(f"{repo}: expected a repository owner/name: {_line(error)}") from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:
        raise RunError(f"{repo}: not uploaded: {_line(error)}") from None
    return str(url)


def _advice(run: Path, best: bool) -> str:
    """Says why there is no student, and what to do."""
    if not (run / "config.yaml").exists():
        return f"expected a run directory, got {run}"
    if best:
        return "the recipe needs an evaluate section for there to be a best student"
    return f"the run is not finished: poweropd train {run}/config.yaml"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
