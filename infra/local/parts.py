"""THE TABLE of what a stack consists of: a row says how a part is started, and how to find out whether it is well.

In: the ports and folders of one stack. Out: commands and environments. A stack of another kind is a row of `KINDS`: its parts,
its ports, and where its data are.
"""

import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from infra.local import postgres, seaweed
from infra.local.private import make_passwords, read_password
from infra.local.probes import answers, ask, listens, name_of, tree_of
from rcnn.config import PipelineConfig
from rcnn.errors import ClusterError, ConfigError
from rcnn.signals import SECONDS_TO_END
from rcnn.tracking import has_store, runs_page

ROOT = Path(__file__).parents[2]
STORAGE = Path(os.environ.get("RCNN_STORAGE", ROOT / "storage")).absolute()
# Independent of the settings: `make down` must find what `make up` started. Tests use their own.
STATE = Path(os.environ.get("STACK_STATE", ROOT / "storage" / "stack")).absolute()
PROD = STATE / "prod"
"""All that the production-like stack keeps: databases, objects, passwords."""
PASSWORDS = PROD / "passwords.json"
MARK, PART = "STACK_MARK", "STACK_PART"
WORKER = "local"
SECONDS_FOR_A_JOB = 120

USUAL_PORTS = {"PREFECT_PORT": 4200, "MLFLOW_PORT": 5000, "RAY_DASHBOARD_PORT": 8265, "RAY_PORT": 6379}
"""Those that people use; where one is taken, another is chosen, unless the variable asks for it."""
INNER_PORTS = (
    "RAY_AGENT",
    "RAY_AGENT_GRPC",
    "RAY_RUNTIME_ENV",
    "RAY_CLIENT",
    "RAY_METRICS",
    "RAY_AUTOSCALER",
    "RAY_HEAD",
)
"""Those that Ray fixes, or chooses long before it uses them: two Rays on a machine collide there."""


@dataclass(frozen=True)
class Stack:
    """One stack, as `make up` recorded it.

    Attributes:
        kind: a key of `KINDS`.
        mark: in the environment of all its processes.
        ports: by the names above.
        folder: for sockets, whose paths have to be short, and for Ray's session.
    """

    kind: str
    mark: str
    ports: dict[str, int]
    folder: str

    @property
    def row(self) -> "Kind":
        """What is true of all stacks of its kind."""
        return KINDS[self.kind]

    @property
    def parts(self) -> "tuple[Part, ...]":
        """What it consists of, in the order in which it starts."""
        return self.row.parts

    def part(self, name: str) -> "Part":
        """One of its parts."""
        return next(part for part in self.parts if part.name == name)

    def url(self, port: str) -> str:
        """The address of a server."""
        return f"http://127.0.0.1:{self.ports[port]}"

    @property
    def prefect_api(self) -> str:
        """What PREFECT_API_URL is to be."""
        return f"{self.url('PREFECT_PORT')}/api"

    @property
    def socket(self) -> str:
        """Where the process manager listens."""
        return f"{self.folder}/supervisor.sock"

    def environment(self) -> dict[str, str]:
        """The environment of all parts; RCNN_... variables give the flow and the jobs the addresses."""
        return {
            MARK: self.mark,
            "STACK_STATE": str(STATE),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PWD": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "RCNN_STORAGE": self.row.storage,
            "RCNN_TRACKING__URI": self.url("MLFLOW_PORT"),
            "PREFECT_HOME": str(self.row.folder / "prefect"),
            "PREFECT_API_URL": self.prefect_api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_END),  # of jobs that are submitted by hand
            "RAY_USAGE_STATS_ENABLED": "0",
            **self.ray_client(),
        }

    def ray_client(self) -> dict[str, str]:
        """What a process needs to reach this Ray, and no other one of the machine."""
        return {
            "RAY_API_SERVER_ADDRESS": self.url("RAY_DASHBOARD_PORT"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(STATE / "ray-token"),
            # 0 keeps Ray on loopback, on Linux too. A client without it looks for Ray at the address of the network.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }


def recorded() -> Stack | None:
    """The stack that was started last, unless it was stopped."""
    file = STATE / "state.json"
    return Stack(**json.loads(file.read_text())) if file.exists() else None


@dataclass(frozen=True)
class Part:
    """A row of the table.

    Attributes:
        name: in commands, logs and messages.
        command: what the process becomes.
        fault: what is wrong with a process of it that runs; empty: it is well. Asked every few seconds.
        address: what people open; empty: nothing.
        environment: what it has besides that of the stack.
        needs: the parts that are waited for before it starts.
        proof: shows at its start that it does its work, and takes seconds; raises a `ClusterError`.
        stop_signal: what ends it in an orderly way.
    """

    name: str
    command: Callable[[Stack], list[str]]
    fault: Callable[[Stack, psutil.Process], str]
    address: Callable[[Stack], str] = lambda stack: ""
    environment: Callable[[Stack], dict[str, str]] = lambda stack: {}
    needs: tuple[str, ...] = ()
    proof: Callable[[Stack], None] | None = None
    stop_signal: str = "TERM"


@dataclass(frozen=True)
class Kind:
    """A row of the table of stacks.

    Attributes:
        target: of the Makefile, that starts it.
        parts: in the order in which they start.
        usual_ports: those that people use; where one is taken, another is chosen, unless the variable asks for it.
        inner_ports: those that are always chosen free.
        folder: for what a new stack of this kind finds again; kinds share none.
        storage: what RCNN_STORAGE is.
        prepare: checks what the machine must have, and makes what is there before the first server starts.
        foreign: how variables begin that no part may take from the user's shell.
        shell: what a shell exports besides the addresses.
    """

    target: str
    parts: tuple[Part, ...]
    usual_ports: Mapping[str, int]
    inner_ports: tuple[str, ...]
    folder: Path
    storage: str
    prepare: Callable[[], None]
    foreign: tuple[str, ...] = ()
    shell: Callable[[Stack], dict[str, str]] = field(default=lambda stack: {})


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _prefect_command(stack: Stack) -> list[str]:
    return [_program("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(stack.ports["PREFECT_PORT"])]


def _prefect_environment(stack: Stack) -> dict[str, str]:
    # In memory, as Prefect has them, a restart loses the leases of its concurrency limits, and running flows crash (410).
    return {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


def _mlflow_command(stack: Stack) -> list[str]:
    # The artifacts are in the folder that runs without a server use, so that both can continue one experiment.
    where = ["--host", "127.0.0.1", "--port", str(stack.ports["MLFLOW_PORT"]), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{STORAGE}/mlflow.db", "--no-serve-artifacts"]
    return [_program("mlflow"), "server", *where, *store, "--default-artifact-root", f"{STORAGE}/mlflow-artifacts"]


def _ray_command(stack: Stack) -> list[str]:
    fixed = {
        "port": "RAY_PORT",
        "dashboard-port": "RAY_DASHBOARD_PORT",
        "dashboard-agent-listen-port": "RAY_AGENT",
        "dashboard-agent-grpc-port": "RAY_AGENT_GRPC",
        "runtime-env-agent-port": "RAY_RUNTIME_ENV",
        "ray-client-server-port": "RAY_CLIENT",
        "metrics-export-port": "RAY_METRICS",
    }
    ports = [word for option, name in fixed.items() for word in (f"--{option}", str(stack.ports[name]))]
    # 0: each worker binds a port that the system gives it, instead of the first one of a range that two Rays share.
    workers = ["--min-worker-port", "0", "--max-worker-port", "0"]
    here = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--temp-dir", f"{stack.folder}/ray"]
    return [_program("ray"), "start", "--head", "--block", "--disable-usage-stats", *here, *ports, *workers]


def _ray_environment(stack: Stack) -> dict[str, str]:
    return {
        "RCNN_RAY__ADDRESS": "auto",  # jobs join the cluster
        "AUTOSCALER_METRIC_PORT": str(stack.ports["RAY_AUTOSCALER"]),
        "DASHBOARD_METRIC_PORT": str(stack.ports["RAY_HEAD"]),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def _worker_command(stack: Stack) -> list[str]:
    return [_program("prefect"), "worker", "start", "--pool", "rcnn", "--type", "process", "--name", WORKER]


def _worker_environment(stack: Stack) -> dict[str, str]:
    return {
        "RCNN_RAY__ADDRESS": stack.url("RAY_DASHBOARD_PORT"),  # flows submit jobs to it
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_WORKER_PREFETCH_SECONDS": "2",
        "PREFECT_WORKER_ENABLE_CANCELLATION": "true",  # of runs that wait
    }


def _keeper_command(stack: Stack) -> list[str]:
    return [sys.executable, "-m", "infra.local.keeper"]


def _web_fault(port: str, path: str) -> Callable[[Stack, psutil.Process], str]:
    """Whether the part itself, and not another process of the machine, answers."""

    def fault(stack: Stack, process: psutil.Process) -> str:
        if not any(listens(each, stack.ports[port]) for each in tree_of(process)):
            return f"does not listen on port {stack.ports[port]}"
        return "" if answers(f"{stack.url(port)}{path}") else "does not answer"

    return fault


def _ray_fault(stack: Stack, process: psutil.Process) -> str:
    """`ray start --block` keeps running after a SIGTERM ended one of its processes, so it does not show that they are alive."""
    names = {name_of(each) for each in tree_of(process)}
    for needed in ("gcs_server", "raylet"):
        if needed not in names:
            return f"its process {needed} is missing"
    return _web_fault("RAY_DASHBOARD_PORT", "/api/version")(stack, process)


def _worker_fault(stack: Stack, process: psutil.Process) -> str:
    workers = ask(f"{stack.prefect_api}/work_pools/rcnn/workers/filter", data=b"{}") or []
    for worker in workers:
        if worker["name"] == WORKER and worker["status"] == "ONLINE":
            since = datetime.fromtimestamp(
                process.create_time(), UTC
            )  # an earlier one of this name counts as online too
            seen = datetime.fromisoformat(worker["last_heartbeat_time"].replace("Z", "+00:00"))
            return "" if seen > since else "has not reported to Prefect yet"
    return "has not reported to Prefect yet"


def _run_a_job(stack: Stack) -> None:
    """Runs a job that does nothing: an answering dashboard may be another Ray's, or have no agent that starts jobs."""
    from flows.job_server import JobServer  # late: Ray takes seconds to import

    server, job_id = JobServer(stack.url("RAY_DASHBOARD_PORT"), minutes=1), f"stack-check-{uuid.uuid4().hex[:8]}"
    server.submit(job_id, "true")
    status = server.wait_for(job_id, seconds=SECONDS_FOR_A_JOB)
    if status != "SUCCEEDED":
        raise ClusterError(
            f"Ray runs no jobs: one that does nothing is {status}",
            where=f"job {job_id} at {server.address}",
            remedy=f"See {STATE / 'logs' / 'ray.log'}, and the logs in {stack.folder}/ray/session_latest/logs",
        )


def _mlflow_page(stack: Stack) -> str:
    """The training runs of the experiment that was used last; MLflow's own address as long as there is none."""
    question = {"max_results": 1, "filter": "name LIKE 'rcnn/%'", "order_by": ["last_update_time DESC"]}
    url = stack.url("MLFLOW_PORT")
    answer = ask(f"{url}/api/2.0/mlflow/experiments/search", json.dumps(question).encode()) or {}
    found = [each["experiment_id"] for each in answer.get("experiments", [])]
    return runs_page(url, found[0]) if found else url


def _create_store() -> None:
    """Creates MLflow's store before its server would: a server that is killed while creating it leaves a broken store.

    Raises:
        ConfigError: the storage is not a folder.
    """
    given = os.environ.get("RCNN_STORAGE", "")
    if "://" in given:
        raise ConfigError(
            f"{given!r} is not a folder, which `make up` needs",
            where="RCNN_STORAGE",
            remedy="`unset RCNN_STORAGE`, or use `make up-prod`, which has an S3 store of its own",
        )
    config = PipelineConfig().with_settings({"storage": str(STORAGE)})
    if not has_store(config):
        from rcnn.registry.mlflow_store import create_store  # late: MLflow takes seconds to import

        create_store(config)


def _postgres_fault(stack: Stack, process: psutil.Process) -> str:
    port = stack.ports["POSTGRES_PORT"]
    if not any(listens(each, port) for each in tree_of(process)):
        return f"does not listen on port {port}"
    return postgres.connection_fault(port, _database_passwords())


def _database_passwords() -> dict[str, str]:
    return {name: read_password(PASSWORDS, name) for name in postgres.DATABASES}


def _s3_client(stack: Stack) -> dict[str, str]:
    return seaweed.client_environment(stack.url("S3_PORT"), read_password(PASSWORDS, "s3"))


def _prefect_prod_environment(stack: Stack) -> dict[str, str]:
    # In pieces: a URL with the password would be in Prefect's error messages.
    prefix = "PREFECT_SERVER_DATABASE_"
    return _prefect_environment(stack) | {
        f"{prefix}DRIVER": "postgresql+asyncpg",
        f"{prefix}HOST": "127.0.0.1",
        f"{prefix}PORT": str(stack.ports["POSTGRES_PORT"]),
        f"{prefix}NAME": "prefect",
        f"{prefix}USER": "prefect",
        f"{prefix}PASSWORD": read_password(PASSWORDS, "prefect"),
    }


def _mlflow_prod_command(stack: Stack) -> list[str]:
    # The password is in PGPASSWORD. Clients send artifacts to the server, which alone needs to reach its bucket.
    where = ["--host", "127.0.0.1", "--port", str(stack.ports["MLFLOW_PORT"]), "--workers", "1"]
    store = f"postgresql+psycopg://mlflow@127.0.0.1:{stack.ports['POSTGRES_PORT']}/mlflow"
    artifacts = ["--serve-artifacts", "--artifacts-destination", "s3://mlflow/artifacts"]
    return [_program("mlflow"), "server", *where, "--backend-store-uri", store, *artifacts]


def _mlflow_prod_environment(stack: Stack) -> dict[str, str]:
    password = {"PGPASSWORD": read_password(PASSWORDS, "mlflow")}
    return _MLFLOW.environment(stack) | _s3_client(stack) | password


def _worker_prod_environment(stack: Stack) -> dict[str, str]:
    return _worker_environment(stack) | _s3_client(stack)


def _prepare_prod() -> None:
    postgres.require_postgres()
    seaweed.require_weed()
    cluster = PROD / "postgres"
    make_passwords(PASSWORDS, known_to=cluster)
    postgres.create_cluster(cluster, _database_passwords())
    (PROD / "s3").mkdir(mode=0o700, exist_ok=True)


def _prod_shell(stack: Stack) -> dict[str, str]:
    return {"RCNN_STORAGE": stack.row.storage, "RCNN_TRACKING__URI": stack.url("MLFLOW_PORT"), **_s3_client(stack)}


_PREFECT = Part(
    "prefect",
    command=_prefect_command,
    environment=_prefect_environment,
    fault=_web_fault("PREFECT_PORT", "/api/health"),
    address=lambda stack: stack.url("PREFECT_PORT"),
)
_MLFLOW = Part(
    "mlflow",
    command=_mlflow_command,
    # Saves 5 s of the server's start (22 s to 17 s) and eight processes, for features that are not used here.
    environment=lambda stack: {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    fault=_web_fault("MLFLOW_PORT", "/health"),
    address=_mlflow_page,
)
_RAY = Part(
    "ray",
    command=_ray_command,
    environment=_ray_environment,
    fault=_ray_fault,
    address=lambda stack: stack.url("RAY_DASHBOARD_PORT"),
    proof=_run_a_job,
)
_WORKER = Part(
    "worker",
    command=_worker_command,
    environment=_worker_environment,
    fault=_worker_fault,
    needs=("prefect",),
)
_KEEPER = Part(
    "keeper",
    command=_keeper_command,
    environment=_worker_environment,
    fault=lambda stack, process: "",
    needs=("prefect", "mlflow"),
)
_POSTGRES = Part(
    "postgres",
    command=lambda stack: postgres.server_command(PROD / "postgres", stack.ports["POSTGRES_PORT"]),
    fault=_postgres_fault,
    stop_signal="INT",  # TERM waits until the last client has left
)
_S3 = Part(
    "s3",
    command=lambda stack: seaweed.server_command(PROD / "s3", stack.ports),
    environment=_s3_client,
    fault=_web_fault("S3_PORT", "/healthz"),
    address=lambda stack: stack.url("S3_PORT"),
    proof=lambda stack: seaweed.create_buckets(stack.url("S3_PORT"), read_password(PASSWORDS, "s3")),
)
KINDS = {
    "local": Kind(
        "up",
        parts=(_PREFECT, _MLFLOW, _RAY, _WORKER, _KEEPER),
        usual_ports=USUAL_PORTS,
        inner_ports=INNER_PORTS,
        folder=STATE,
        storage=str(STORAGE),
        prepare=_create_store,
    ),
    "prod": Kind(
        "up-prod",
        parts=(
            _POSTGRES,
            _S3,
            replace(_PREFECT, environment=_prefect_prod_environment, needs=("postgres",)),
            replace(
                _MLFLOW,
                command=_mlflow_prod_command,
                environment=_mlflow_prod_environment,
                needs=("postgres", "s3"),
            ),
            replace(_RAY, environment=lambda stack: _ray_environment(stack) | _s3_client(stack)),
            replace(_WORKER, environment=_worker_prod_environment),
            replace(_KEEPER, environment=_worker_prod_environment),
        ),
        usual_ports=USUAL_PORTS | seaweed.USUAL_PORTS | {"POSTGRES_PORT": 5432},
        inner_ports=(*INNER_PORTS, *seaweed.INNER_PORTS),
        folder=PROD,
        storage=seaweed.STORAGE,
        prepare=_prepare_prod,
        foreign=("AWS_", "PG", "PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_"),
        shell=_prod_shell,
    ),
}
