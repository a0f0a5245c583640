"""Tokenizer files beside a model: which ids they use, and copying them along.

    vocabulary = Vocabulary(folder)
    vocabulary.check(config.vocab_size)
    carry(folder, target)

They are read as files: neither transformers nor code that comes with a tokenizer is run.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from shared.experiment.contracts import AssayError
from shared.experiment.files import sync_folder

CARRIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)


class TokenizerDoesNotFit(AssayError):
    """A tokenizer is missing, cannot be read, or has tokens that the model has no embedding for."""


def carry(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation_config.json byte for byte, as far as they exist."""
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            with open(target / name, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(target)


class Vocabulary:
    """What a folder's tokenizer files say about token ids.

    size: 1 + the largest id, added tokens included. Raises `TokenizerDoesNotFit` where nothing can be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            if (folder / "tokenizer.json").exists():
                from tokenizers import Tokenizer

                self._ids: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
            elif (folder / "tokenizer.model").exists():
                from sentencepiece import SentencePieceProcessor

                pieces: Any = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
                self._ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())} | self._json(
                    "added_tokens"
                )
            else:
                raise TokenizerDoesNotFit(
                    f"{folder} has neither tokenizer.json nor tokenizer.model: choose another one"
                )
        except AssayError:
            raise
        except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError and OSError
            raise TokenizerDoesNotFit(f"the tokenizer in {folder} cannot be read ({error}): copy it again") from error
        self.size = 1 + max(self._ids.values(), default=-1)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def check(self, vocab_size: int) -> None:
        """Raises `TokenizerDoesNotFit` if the model has fewer embeddings than there are ids."""
        if self.size > vocab_size:
            raise TokenizerDoesNotFit(
                f"the tokenizer in {self.folder} has ids up to {self.size - 1} and the model embeds {vocab_size}: use "
                "the tokenizer that the model was trained with"
            )

    def special_ids(self) -> dict[str, int | list[int] | None]:
        """bos_token_id, eos_token_id, pad_token_id: from config.json beside the tokenizer, else from its own files."""
        model, own = self._json("config"), self._json("tokenizer_config")
        ids: dict[str, int | list[int] | None] = {}
        for kind in ("bos", "eos", "pad"):
            token = own.get(f"{kind}_token") or ""
            found = self._ids.get(token["content"] if isinstance(token, dict) else token)
            ids[f"{kind}_token_id"] = model.get(f"{kind}_token_id", found)
        return ids
