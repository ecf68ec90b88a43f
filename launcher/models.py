"""Finding the model: in a folder, built in, or by its name on the Hugging Face Hub.

A folder wins over a name. A name is looked for in the local cache, which everything that uses the
Hub shares, and only missing files are downloaded: weights as safetensors, and the JSON and
templates beside them. The places of the cache and of the Hub are in huggingface_hub's own variables
 (``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``).
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import httpx

from modeling.checkpoint.config import is_arithmetic
from modeling.checkpoint.folder import read_checkpoint
from modeling.embedded import CHECKPOINT
from protocol.errors import ConfigError

WANTED = ("*.safetensors", "*.json", "*.jinja")
# Folders hold the weights in other forms, and so does a file beside Mistral's shards.
UNWANTED = ("*/*", "consolidated*.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The path or name that processes load, and the default name in requests."""

    path_or_name: str
    name: str


def find_model(asked: str | None, revision: str | None) -> FoundModel:
    """The model of ``baton serve MODEL --revision NAME``. May download it, with a progress bar.

    Args:
        asked: the argument; None is the embedded model.
        revision: of a model on the Hub; None is its main branch.

    Raises:
        ConfigError: it is neither here nor on the Hub, or a folder was given with a revision.
    """
    path = Path(CHECKPOINT if asked is None else asked).expanduser()
    is_built_in = asked is not None and is_arithmetic(asked)
    is_named = asked is not None and _HUB_NAME.fullmatch(asked) is not None and not is_built_in
    if is_named and not path.exists():
        assert asked is not None
        return FoundModel(str(_from_hub(asked, revision).resolve()), asked)
    if revision is not None:
        raise ConfigError(f"--revision {revision}: {asked} is not a model on the Hub")
    if is_built_in:
        assert asked is not None
        return FoundModel(asked, asked)
    if is_named:
        log.warning(
            "%s is a folder here: it is served, not the model of that name on the Hub", path
        )
    return FoundModel(str(path.resolve()), path.resolve().name)


def _from_hub(name: str, revision: str | None) -> Path:
    folder = _cached(name, revision)
    if folder is not None:
        return folder
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    shown = name if revision is None else f"{name} at {revision}"
    log.info("downloading %s from the Hub", shown)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED]
            )
        )
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"{shown}: the Hub asks for its conditions to be accepted: do so on its page, then "
            f"hf auth login"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{shown}: no such folder here, and no such model on the Hub, or none that this user "
            f"may see: check the name, or hf auth login"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"{shown}: the Hub has the model, but not that revision") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"{shown}: no such folder here, not in the local cache, and the Hub cannot be reached "
            f"({reason}): run hf download {name} where it can, or give a folder"
        ) from error


def _cached(name: str, revision: str | None) -> Path | None:
    """The model's folder in the local cache, if it is there whole."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        read_checkpoint(folder)
    except (OSError, ValueError):  # ConfigError is one: weights are missing
        return None
    return folder
