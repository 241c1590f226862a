"""One's own data in COCO format, as a command line names it."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class OwnData:
    """Data in COCO format: annotation files and image folders of a training and a test set."""

    train: str
    test: str
    train_images: str
    test_images: str

    NAMES = ("own_train", "own_val")

    @classmethod
    def parse(cls, text: str) -> "OwnData":
        """
        Read "train.json,val.json,images", or four parts with a folder for each.

        Raises:
            ValueError: another number of parts.
            FileNotFoundError: one of them does not exist.
        """
        parts = [part.strip() for part in text.split(",")]
        if len(parts) not in (3, 4) or not all(parts):
            raise ValueError(
                f"--data is {text!r}; expected TRAIN.json,VAL.json,IMAGES, or with a folder for "
                "each, TRAIN.json,VAL.json,TRAIN_IMAGES,VAL_IMAGES."
            )
        for part, kind in zip(parts, ("file", "file", "folder", "folder"), strict=False):
            there = os.path.isfile(part) if kind == "file" else os.path.isdir(part)
            if not there:
                raise FileNotFoundError(f"--data names {part}, but there is no such {kind}.")
        return cls(parts[0], parts[1], parts[2], parts[-1])
