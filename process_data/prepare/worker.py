"""One stage of COLMAP in a process of its own: ``python worker.py JOB.json``.

Started by ``process_data.prepare.colmap`` as a script, so that nothing but pycolmap is imported and it is up
at once. A process of its own can be ended within a moment while it is deep in C++ (Ctrl-C), and its log
(stdout and stderr) goes to a file, from which the progress is read, instead of over the terminal.

The job names the stage, the working folder and its options::

    {"stage": "features" | "matches" | "mapping" | "undistort", "folder": "...", ...}

Source: pycolmap 4.2 (Schoenberger and Frahm, Structure-from-Motion Revisited, CVPR 2016).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap

PAIRS_PER_BLOCK = 50
"""COLMAP says something once per block: small blocks make the progress bar move."""


def extract(folder: Path, job: dict[str, Any]) -> None:
    """SIFT features of all pictures, one call per group of pictures that share a camera."""
    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu = False
    options.max_image_size = job["feature_size"]
    options.sift.max_num_features = job["max_features"]
    reader = pycolmap.ImageReaderOptions()
    reader.camera_model = job["camera_model"]
    if job["has_masks"]:
        reader.mask_path = str(folder / "masks")
    mode = pycolmap.CameraMode.SINGLE if job["single_camera"] else pycolmap.CameraMode.PER_IMAGE
    for names in job["groups"]:
        pycolmap.extract_features(
            folder / "database.db",
            folder / "images",
            image_names=names,
            camera_mode=mode,
            reader_options=reader,
            extraction_options=options,
        )


def match(folder: Path, job: dict[str, Any]) -> None:
    """Match the pairs of pictures listed in pairs.txt and verify them geometrically."""
    matching = pycolmap.FeatureMatchingOptions()
    matching.use_gpu = False
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = str(folder / "pairs.txt")
    pairing.block_size = PAIRS_PER_BLOCK
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = job["seed"]
    # With a turning object, whatever stays in place is the room.
    verification.filter_stationary_matches = job["turntable"]
    pycolmap.match_image_pairs(folder / "database.db", matching, pairing, verification)


def reconstruct(folder: Path, job: dict[str, Any]) -> None:
    """Incremental mapping; every model found is written to models/0, models/1, ..."""
    options = pycolmap.IncrementalPipelineOptions()
    options.random_seed = job["seed"]
    options.mapper.random_seed = job["seed"]
    options.triangulation.random_seed = job["seed"]
    # A small capture may place fewer photos than COLMAP's default of 10.
    options.min_model_size = 3
    pycolmap.incremental_mapping(
        folder / "database.db", folder / "images", folder / "models", options=options
    )


def undistort(folder: Path, job: dict[str, Any]) -> None:
    """Write pinhole pictures and masks, and the model that belongs to them, to undistorted/."""
    target, options = folder / "undistorted", pycolmap.UndistortCameraOptions()
    # Nearly lossless, because this is a second encoding of the photo.
    pycolmap.undistort_images(
        target, Path(job["model"]), Path(job["images"]), undistort_options=options, jpeg_quality=95
    )
    if job["masks"] is None:
        return
    (target / "masks").mkdir()
    for image in pycolmap.Reconstruction(Path(job["model"])).images.values():
        name = f"{Path(image.name).stem}.png"
        mask = pycolmap.Bitmap.read(Path(job["masks"]) / name, as_rgb=False)
        assert mask is not None and image.camera is not None
        grey = pycolmap.undistort_image(options, mask, image.camera)[0].to_array()
        binary = np.where(grey >= 128, 255, 0).astype(np.uint8)
        pycolmap.Bitmap.from_array(binary).write(target / "masks" / name)


STAGES = {"features": extract, "matches": match, "mapping": reconstruct, "undistort": undistort}


def main(job_path: Path) -> None:
    """Run the stage that a job file describes."""
    job = json.loads(job_path.read_text(encoding="utf-8"))
    pycolmap.set_random_seed(job["seed"])
    pycolmap.logging.alsologtostderr = True
    STAGES[job["stage"]](Path(job["folder"]), job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
