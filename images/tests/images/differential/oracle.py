"""Judges TUF repositories with the reference implementation: one JSON object a line in, one a line out.

In: {"root": HEX, "states": [{PATH: HEX}], "targets": [PATH]}. The states are the same repository at later times; one
client sees them all. Out: for each state what came of the update, and of each target: "ok SHA256", or the error.
"""

import json, os, sys, tempfile
from hashlib import sha256
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater


class Files(FetcherInterface):
    def __init__(self, files):
        self.files = files

    def _fetch(self, url):
        path = url.removeprefix("mem://")
        if path not in self.files:
            raise DownloadHTTPError("not found", 404)
        return iter([bytes.fromhex(self.files[path])])


def why(error):
    words = []
    while error is not None:
        words.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "; ".join(words).replace("\n", " ")


def judge(case):
    verdicts = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        metadata, files = Path(folder, "metadata"), Path(folder, "files")
        metadata.mkdir(), files.mkdir()
        for state in case["states"]:
            verdict = {"refresh": "ok", "targets": {}}
            verdicts.append(verdict)
            try:
                updater = Updater(
                    str(metadata), "mem://metadata/", str(files), "mem://targets/",
                    fetcher=Files(state), bootstrap=bytes.fromhex(case["root"]),
                )
                updater.refresh()
            except Exception as error:  # whatever it is, the update failed
                verdict["refresh"] = why(error)
                continue
            for path in case["targets"]:
                try:
                    info = updater.get_targetinfo(path)
                    if info is None:
                        verdict["targets"][path] = "not listed"
                        continue
                    data = Path(updater.download_target(info)).read_bytes()
                    verdict["targets"][path] = "ok " + sha256(data).hexdigest()
                except Exception as error:
                    verdict["targets"][path] = why(error)
    return verdicts


for line in sys.stdin:
    print(json.dumps(judge(json.loads(line))), flush=True)
