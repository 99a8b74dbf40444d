"""A recipe that was asked for runs to its end once, whoever dies in between."""

import os
import random
import signal

import headrace
from conftest import wait_until

RECIPE = """
dataset: clean
collect: [{dataset: raw@latest}]
clean:
  - drop_nulls: [a]
  - dedup: {exact: true, columns: [a, b]}
transform:
  - features: {columns: [a, b], label: y, standardize: true}
"""
KILLS, RUNS = 4, 8


def test_runs_survive_the_death_of_their_worker_and_publish_once(serve):
    chance = random.Random(7)
    with headrace.connect(serve.url, serve.token) as ex:
        ex.upload("raw", [{"a": float(i), "b": i % 7, "y": i} for i in range(200)] + [{"a": None, "b": 1, "y": 0}])
        for number in range(RUNS):
            run = ex.run(RECIPE, wait=False)
            if number % (RUNS // KILLS) == 0:
                # Somewhere on the way: as soon as the run shows some chosen progress, or has ended already.
                goal = chance.random() * 0.9
                wait_until(lambda run=run, goal=goal: ex.run_status(run.id).progress >= goal, 60)
                for pid in serve.workers():
                    os.kill(pid, signal.SIGKILL)
            done = ex.wait(run.id)
            assert (done.status, done.rows_in, done.rows_out) == ("succeeded", 201, 200)
        versions = ex.versions("clean")
        assert len(versions) == RUNS
        assert len({version.fingerprint for version in versions}) == 1
        assert len({version.run for version in versions}) == RUNS
