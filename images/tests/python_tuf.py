"""Reads a repository with the reference implementation of TUF, or writes one.

read REPO ROOT TARGET...   updates from REPO through ngclient, prints each target's text
write DIR                  makes a repository with two delegations, in two states of its root
"""

import sys, tempfile
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp,
)
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater


class Files(FetcherInterface):
    """Serves `file:` paths as a web server would."""

    def _fetch(self, url):
        path = Path(url.removeprefix("file://"))
        if not path.exists():
            raise DownloadHTTPError("not found", 404)
        return iter([path.read_bytes()])


def read(repo, root, targets):
    with tempfile.TemporaryDirectory() as cache:
        metadata, files = Path(cache, "metadata"), Path(cache, "files")
        metadata.mkdir(), files.mkdir()
        updater = Updater(
            str(metadata), f"file://{repo}/metadata/", str(files), f"file://{repo}/targets/",
            fetcher=Files(), bootstrap=Path(root).read_bytes(),
        )
        updater.refresh()
        for name in targets:
            info = updater.get_targetinfo(name)
            if info is None:
                sys.exit(f"{name}: not listed")
            print(Path(updater.download_target(info)).read_text().strip())


def write(folder):
    expires = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=30)
    base = Path(folder)
    (base / "metadata").mkdir(parents=True)
    roles = ["root", "timestamp", "snapshot", "targets", "image-minimal", "odd role/ü"]
    keys = {role: CryptoSigner.generate_ed25519() for role in roles}
    new_root = CryptoSigner.generate_ed25519()

    def put(name, metadata, signers):
        for i, signer in enumerate(signers):
            metadata.sign(signer, append=i > 0)
        data = metadata.to_bytes()
        (base / "metadata" / name).write_bytes(data)
        return MetaFile(metadata.signed.version, len(data), {"sha256": sha256(data).hexdigest()})

    root = Root(expires=expires)
    for role in roles[:4]:
        root.add_key(keys[role].public_key, role)
    put("1.root.json", Metadata(root), [keys["root"]])
    # Version 2 adds a root key and asks for both.
    root.version = 2
    root.add_key(new_root.public_key, "root")
    root.roles["root"].threshold = 2
    put("2.root.json", Metadata(root), [keys["root"], new_root])

    def target(path, data):
        info = TargetFile.from_data(path, data, ["sha256", "sha512"])
        file = base / "targets" / Path(path).parent / f"{info.hashes['sha256']}.{Path(path).name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return info

    snapshot = Snapshot(expires=expires)
    delegated = {
        "image-minimal": (["minimal/*/manifest.json"], "minimal/1/manifest.json"),
        "odd role/ü": (["odd/*"], "odd/file"),
    }
    targets = Targets(expires=expires)
    targets.targets["site.json"] = target("site.json", "site of äöü \\ \" \n".encode())
    targets.unrecognized_fields["x-note"] = {"text": "ä\"\\\n\t", "numbers": [-1, 0, 2**53], "none": None}
    targets.delegations = Delegations({}, {})
    for role, (paths, path) in delegated.items():
        targets.delegations.roles[role] = DelegatedRole(role, [], 1, True, paths)
        targets.add_key(keys[role].public_key, role)
        child = Targets(expires=expires)
        child.targets[path] = target(path, path.encode())
        quoted = role.replace("/", "%2F").replace(" ", "%20").replace("ü", "%C3%BC")
        snapshot.meta[f"{role}.json"] = put(f"1.{quoted}.json", Metadata(child), [keys[role]])
    snapshot.meta["targets.json"] = put("1.targets.json", Metadata(targets), [keys["targets"]])
    listed = put("1.snapshot.json", Metadata(snapshot), [keys["snapshot"]])
    put("timestamp.json", Metadata(Timestamp(expires=expires, snapshot_meta=listed)), [keys["timestamp"]])


if sys.argv[1] == "read":
    read(sys.argv[2], sys.argv[3], sys.argv[4:])
else:
    write(sys.argv[2])
