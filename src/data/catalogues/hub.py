"""Image sets of the Hugging Face hub, whose Parquet files are downloaded once."""

import json
import logging
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from src.data.catalogue import Catalogue
from src.data.catalogues.parquet import Parquet
from src.errors import UserError, reason
from src.files import replacing

WHOLE = ".complete.json"  # the files of a download that has ended
CONVERTED = "refs/convert/parquet"  # where the hub keeps the tables of sets that are made otherwise


@dataclass(frozen=True)
class Hub:
    """A dataset of the Hugging Face hub, kept in a folder of its own in data.dir; or a local folder of Parquet files.

    Args:
        name: "owner/name" on the hub, or a folder.
        subset: the one of its configurations, a folder of its files, to take; None for all files.
        revision: a branch, tag or commit; None for the main one.
        image, shape, float_range, gaps: see `Parquet`.
    """

    name: str
    subset: str | None = None
    revision: str | None = None
    image: str | None = None
    shape: tuple[int, int, int] | None = None
    float_range: tuple[float, float] = (-1.0, 1.0)
    gaps: bool = False

    def __post_init__(self) -> None:
        Parquet(self.image, self.shape, self.float_range, self.gaps)

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """See `Parquet.catalogues`.

        Args:
            dir: where the files are kept.

        Raises:
            UserError: also when the files are not there and cannot be downloaded.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            folder = dir / "--".join(part for part in (*self.name.split("/"), self.subset, self.revision) if part)
            if not _is_whole(folder):
                self._download(folder)
        elif self.subset is not None:
            folder = folder / self.subset
        return Parquet(self.image, self.shape, self.float_range, self.gaps).catalogues(folder, labels)

    def _download(self, folder: Path) -> None:
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its attempts
        try:
            _resolve(constants.ENDPOINT)
            files, revision = self._files(huggingface_hub.HfApi())
            for file in files:
                huggingface_hub.hf_hub_download(
                    self.name, file, repo_type="dataset", revision=revision, local_dir=folder
                )
        except UserError:
            raise
        except HFValidationError as error:
            raise UserError(
                f"data.source.name={self.name} is neither a folder nor the name of a dataset, owner/name"
            ) from error
        except GatedRepoError as error:
            raise UserError(
                f"{self.name} asks for its terms to be accepted on its page, and for a login (`hf auth login`)"
            ) from error
        except RepositoryNotFoundError as error:
            raise UserError(f"there is no dataset {self.name} on the hub that you may read; check its name") from error
        except Exception as error:  # whatever its network library raises
            raise UserError(
                f"{self.name} is not in {folder} and could not be downloaded ({reason(error)}); put its Parquet files "
                f"into a folder, and give that as data.source.name"
            ) from error
        sizes = {file: (folder / file).stat().st_size for file in files}
        with replacing(folder / WHOLE) as temporary:
            temporary.write_text(json.dumps({"name": self.name, "revision": revision, "files": sizes}, indent=2))

    def _files(self, api: Any) -> tuple[list[str], str | None]:
        revisions = [self.revision] if self.revision is not None else [None, CONVERTED]
        for revision in revisions:
            try:
                names = api.list_repo_files(self.name, repo_type="dataset", revision=revision)
            except Exception:
                if revision != CONVERTED:
                    raise
                names = []
            found = [name for name in names if name.endswith(".parquet")]
            if self.subset is not None:
                found = [name for name in found if self.subset in PurePosixPath(name).parts[:-1]]
            if found:
                return sorted(found), revision
        subset = "" if self.subset is None else f" of the subset {self.subset}"
        raise UserError(
            f"{self.name} holds no Parquet files{subset} on the hub; download it otherwise, for data=folder"
        )


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / WHOLE).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _resolve(endpoint: str) -> None:
    """Fails at once where there is no network; the hub's library would try for half a minute."""
    if not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, 443)
