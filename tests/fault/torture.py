"""Random kills under load, and the tally. `make torture N=2000` runs it long; a test runs it short.

    python -m tests.fault.torture --calls 2000 --seed 7
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from deploy.local.postgres import Postgres
from tests.support.databases import Databases
from tests.support.load import Load, Tally, tally, wait_until
from tests.support.mesh import Mesh
from tests.support.upstream import Upstream

SECONDS_BETWEEN_KILLS = (0.3, 1.5)


def torture(mesh: Mesh, upstream: Upstream, *, postgres: Postgres, calls: int, seed: int, kills: int) -> Tally:
    """Runs the calls while services and the database are killed at random, then waits for rest. Prints the tally."""
    chance = random.Random(seed)
    mesh.register("pro", upstream.base_url, "ok,words=12,pause=0.01")
    load = Load(mesh, f"torture-{seed}", users=8)
    load.give_credit()
    done: dict[str, int] = {}
    rounds = max(1, kills)
    for _ in range(rounds):
        thread = load.run_in_background(max(1, calls // rounds))
        wait_until(lambda: load.outcomes["ok"] > 0, what="a first answer")
        time.sleep(chance.uniform(*SECONDS_BETWEEN_KILLS))
        victim = chance.choice(["llm", "llm", "tokenstore", "tokenstore", "postgres"])
        done[victim] = done.get(victim, 0) + 1
        if victim == "postgres":
            postgres.kill()
            time.sleep(chance.uniform(0.1, 1.0))
            postgres.start()
        else:
            process = mesh.llm if victim == "llm" else mesh.tokenstore
            process.kill()
            time.sleep(chance.uniform(0.0, 1.0))
            process.start()
        thread.join(120)
        mesh.wait_until_serving()
    stuck = 0
    try:
        mesh.wait_for_rest(90)
    except AssertionError as error:
        stuck = mesh.open_holds() + mesh.outbox_size() + mesh.running_calls()
        print(f"not at rest: {error}", file=sys.stderr)
    result = tally(load, upstream)
    print(f"seed {seed}: calls {sum(load.outcomes.values())}, {result}, stuck {stuck}, findings {len(mesh.findings())},"
          f" kills {done}, answers {dict(load.outcomes)}")
    assert stuck == 0
    assert mesh.findings() == []
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=0, help="0 = one for every 100 calls")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="creditmesh-torture-"))
    folder.chmod(0o755)
    postgres, upstream = Postgres(folder / "postgres"), Upstream()
    postgres.start()
    upstream.start()
    mesh = Mesh(Databases(postgres), folder / "logs", name="torture", settings={})
    try:
        mesh.start()
        result = torture(
            mesh, upstream, postgres=postgres, calls=arguments.calls, seed=arguments.seed,
            kills=arguments.kills or max(1, arguments.calls // 100),
        )
        failed = bool(result.lost or result.doubled or result.charged_without_reaching)
    finally:
        mesh.stop()
        upstream.stop()
        postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
