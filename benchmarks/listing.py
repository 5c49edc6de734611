"""How long it takes to list a folder of 2,000 soft prompts, first and again after one change.

    python benchmarks/listing.py

The other contender opens each zip with zipfile and reads its tensor's header and its metadata. Both run in
turns in this process, on the same files: one half as KoboldAI writes them, the other as we do. The listing
judges every file for a model besides.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kobold_sp_plugin import Catalogue, SoftPrompt
from kobold_sp_plugin.compatibility import ModelFacts, fingerprint

FILES = 2000
WIDTH = 768
ROUNDS = 9


class Model:
    """As much of a model as a fingerprint takes."""

    def __init__(self) -> None:
        import torch

        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(5000, WIDTH)

    def get_input_embeddings(self) -> Any:
        return self.embedding


def make_folder(folder: Path, mark: Dict[str, Any], files: int = FILES) -> None:
    """Write the zips; of each kind ten are made, and copied."""
    rng = np.random.RandomState(0)
    for index in range(20):
        metadata = {
            "name": f"Soft prompt {index}",
            "author": "A. Writer",
            "supported": ["GPT-Neo 125M"],
            "description": "Rainy streets, one lamp and a door that should be shut. " * 4,
        }
        rows = rng.randn(20, WIDTH).astype(np.float32)
        original = folder / f"{index}.zip"
        if index % 2:
            SoftPrompt(rows, {**metadata, "kobold_sp_plugin": {"fingerprint": mark}}).save(original)
        else:
            with zipfile.ZipFile(original, "w") as archive:
                with archive.open(zipfile.ZipInfo("tensor.npy"), "w") as member:
                    np.save(member, rows)
                stored = archive.read("tensor.npy")
            with zipfile.ZipFile(original, "w", compression=zipfile.ZIP_LZMA) as archive:
                archive.writestr("tensor.npy", stored)
                archive.writestr("meta.json", json.dumps(metadata, indent=2), zipfile.ZIP_STORED)
        for copy in range(index + 20, files, 20):
            shutil.copyfile(original, folder / f"{copy}.zip")


def read_with_zipfile(folder: Path) -> None:
    """The other contender."""
    for name in os.listdir(folder):
        with zipfile.ZipFile(folder / name) as archive:
            with archive.open("tensor.npy") as member:
                np.lib.format.read_magic(member)
                np.lib.format.read_array_header_1_0(member)
            json.loads(archive.read("meta.json"))


def seconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    mark = fingerprint(Model())
    facts = ModelFacts("model", WIDTH, 1024, mark)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, mark)
        baseline: List[float] = []
        first: List[float] = []
        later: List[float] = []
        for turn in range(ROUNDS):
            catalogue = Catalogue(folder)
            gc.collect()
            baseline.append(seconds(partial(read_with_zipfile, folder)))
            first.append(seconds(partial(catalogue.entries, facts)))
            for change in range(5):
                shutil.copyfile(folder / f"{change}.zip", folder / f"{FILES - 1 - turn}.zip")
                later.append(seconds(partial(catalogue.entries, facts)))
        assert len(catalogue.entries(facts)) == FILES
        assert all(entry.verdict.usable for entry in catalogue.entries(facts))
    print(f"{FILES} zips, medians of {ROUNDS} rounds")
    print(f"  zipfile, header and metadata   {median(baseline) * 1e3:8.1f} ms")
    print(f"  first listing                  {median(first) * 1e3:8.1f} ms   {ratio(first, baseline)} of zipfile's")
    print(
        f"  listing after one change       {median(later) * 1e3:8.1f} ms   {ratio(later, baseline)} of zipfile's, "
        f"{ratio(later, first)} of the first listing"
    )
    print(f"  the slowest of {len(later)} of these      {max(later) * 1e3:8.1f} ms")


def ratio(times: List[float], others: List[float]) -> str:
    """The ratio of two medians, as text."""
    return f"{median(times) / median(others):.4f}"


if __name__ == "__main__":
    main()
