"""Folders stay small enough to read at a glance."""

from pathlib import Path

import pytest

import dftserve.evaluate

MOST_FILES = 12
EVALUATE = Path(dftserve.evaluate.__file__).parent
FOLDERS = [
    folder
    for folder in (EVALUATE, *EVALUATE.rglob("*/"))
    if folder.is_dir() and folder.name != "__pycache__"
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_folder_of_evaluate_has_more_than_a_dozen_files(folder):
    files = [path.name for path in folder.iterdir() if path.is_file()]
    assert len(files) <= MOST_FILES, sorted(files)
