"""BentoML with one worker, one image at a time."""

from pathlib import Path
from typing import Any

import bentoml
from pipeline import postprocess, preprocess, session


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 256})
class Direct:
    def __init__(self) -> None:
        self.session = session()

    @bentoml.api
    def classify(self, image: Path) -> dict[str, Any]:
        return postprocess(self.session(preprocess(image.read_bytes())[None])[0])
