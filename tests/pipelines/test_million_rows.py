"""A plan of a million clips: time and memory of planning, resuming, building and watching."""

import json
import subprocess
import sys

import pytest

PLAN = """
import hashlib, json, resource, sys, time
import pyarrow as pa
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.status import status
number, per_shard, folder = 1_000_000, 500, sys.argv[1]
began = time.monotonic()
table = pa.table({
    "shard": pa.array([i // per_shard for i in range(number)], pa.int32()),
    "key": [hashlib.blake2b(b"%d" % i, digest_size=16).hexdigest() for i in range(number)],
    "source": [f"v/{i // 4}.mp4" for i in range(number)],
})
Artifact.open(folder, kind="clips", config={}).append_plan(table)
again = Artifact.open(folder, kind="clips", config={})
again.append_plan(table)
for shard in range(0, number // per_shard, 100):
    with again.shard_writer(shard) as writer:
        for key, source in writer.planned.items():
            writer.add(key, {"bin": b"x"}, {"source": source})
        writer.commit()
again.finalize()
found = status(folder)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(dict(found, pending=len(again.pending()), seconds=time.monotonic() - began, memory=memory)))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_plan_of_a_million_clips_takes_under_five_minutes_and_two_gigabytes(tmp_path):
    done = subprocess.run([sys.executable, "-c", PLAN, str(tmp_path / "clips")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["shards"], found["done"], found["pending"], found["clips"]) == (2000, 20, 1980, 10_000)
    assert found["seconds"] < 300 and found["memory"] < 2e9
