"""A real Slurm of several nodes on this host for tests: munge, slurmctld and a slurmd per node in a temporary folder.

Nodes are called 127.0.0.11 and so on, names that resolve by themselves; every daemon and job is stopped by its pid.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = "munge slurmctld slurmd slurm-client"
CONF = """
ClusterName=clipmill{port}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
{listen}
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MaxArraySize={max_array}
MinJobAge=3600
FirstJobId={first_job}
KillWait=3
SlurmdTimeout=300
InactiveLimit=0
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.[11-{last}] NodeHostname={host} NodeAddr={address} Port=[{first_port}-{last_port}] CPUs=4 \
RealMemory=64000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
"""


class NoClusterError(Exception):
    """This machine cannot run one; the message says why."""


class Cluster:
    """``run`` asks it something; ``node_pids`` are the processes of a node."""

    def __init__(self, folder: Path, nodes: int = 2, max_array: int = 100) -> None:
        self.folder, self.nodes = folder, [f"127.0.0.{11 + node}" for node in range(nodes)]
        self.conf = folder / "slurm.conf"
        self.max_array = max_array
        self.own = {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        self.environment = {**os.environ, **self.own}

    def start(self) -> None:
        """Raises NoClusterError."""
        if lacking := [name for name in DAEMONS if shutil.which(name, path=self.environment["PATH"]) is None]:
            raise NoClusterError(f"no {', '.join(lacking)}: apt-get install {PACKAGES}")
        if os.getuid() != 0:
            raise NoClusterError("slurmd of several nodes on one host needs root")
        host = socket.gethostname().split(".")[0]
        address = _address(socket.gethostname())
        listen = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if address != "127.0.0.1" or _loopback() else ""
        port, count = _free_ports(len(self.nodes) + 1), len(self.nodes)
        for name in ("munge", "ctld", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.conf.write_text(
            CONF.format(
                port=port,
                host=host,
                address=address,
                folder=self.folder,
                listen=listen,
                last=10 + count,
                first_port=port + 1,
                last_port=port + count,
                max_array=self.max_array,
                first_job=port * 613 % 9000 + 1,
            )
        )
        for gpu in range(2):
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        munge = self.folder / "munge"
        self._daemon(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={munge}/socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        self._daemon("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self._daemon("slurmd", "-f", str(self.conf), "-N", node)
        until(lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() == self.nodes, 30)

    def _daemon(self, *words: str) -> None:
        kept = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/", "SLURM_CONF": str(self.conf)}
        kept["CLIPMILL_CLUSTER"] = str(self.folder)
        done = subprocess.run(
            words, env=kept, cwd=self.folder, capture_output=True, text=True, timeout=30, start_new_session=True
        )
        if done.returncode:
            raise NoClusterError(f"{words[0]} does not start: {done.stderr.strip()[-300:]}")

    def run(self, *words: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def states(self, job: str) -> dict[str, str]:
        """State per task of an array, or of one job."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def ended(self, job: str, seconds: float = 60) -> dict[str, str]:
        """Wait for a job's end; its states."""
        live = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        until(lambda: not live & set(self.states(job).values()), seconds, lambda: f"{job}: {self.states(job)}")
        return self.states(job)

    def daemon_pid(self, name: str) -> int | None:
        """Of a daemon of ours that lives."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
            marks = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if f"CLIPMILL_CLUSTER={self.folder}".encode() in marks and _alive(pid) else None

    def job_pids(self, node: str | None = None, job: str | None = None) -> list[int]:
        """Processes of this cluster's jobs."""
        wanted = {f"SLURM_CONF={self.conf}"} | ({f"SLURMD_NODENAME={node}"} if node else set())
        wanted |= {f"SLURM_JOB_ID={job}"} if job else set()
        return [
            pid
            for pid, marks in _processes()
            if wanted <= marks and any(mark.startswith("SLURM_JOB_ID=") for mark in marks)
        ]

    def kill_node(self, node: str) -> None:
        """What a power cut does: its daemons, steps and jobs are gone at once."""
        pids = [pid for pid in (self.daemon_pid(f"slurmd.{node}"), *self._stepds(node), *self.job_pids(node)) if pid]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Bring a killed node back."""
        self._daemon("slurmd", "-f", str(self.conf), "-N", node)

    def _stepds(self, node: str = "") -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "comm").read_text() == "slurmstepd\n":
                    files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
                    if any(file.startswith(f"{self.folder}/slurmd.{node}") for file in files):
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End jobs, then daemons, by pid."""
        for pids in (
            [*self.job_pids(), *self._stepds()],
            [self.daemon_pid(f"slurmd.{node}") for node in self.nodes],
            [self.daemon_pid("slurmctld"), self.daemon_pid("munged")],
        ):
            for pid in filter(None, pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _processes() -> Iterator[tuple[int, set[str]]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                marks = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
                if _alive(int(entry.name)):
                    yield int(entry.name), marks


def _address(host: str) -> str:
    """Where the host's name is on loopback, that; Slurm binds to it."""
    try:
        found = socket.gethostbyname(host)
    except OSError:
        return "127.0.0.1"
    return found if found.startswith("127.") else "127.0.0.1"


def _loopback() -> bool:
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(14000 + os.getpid() % 500 * 10, 30000, count + 1):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise NoClusterError("no free ports")


def until(true: Callable[[], object], seconds: float, said: Callable[[], str] = lambda: "") -> None:
    """Wait; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s {said()}"
        time.sleep(0.1)


STOP_AT_THE_END = """
import pathlib, sys
sys.stdin.read()
sys.path.insert(0, sys.argv[1])
import slurm_cluster
slurm_cluster.Cluster(pathlib.Path(sys.argv[2]), int(sys.argv[3])).stop()
"""


@contextlib.contextmanager
def cluster(nodes: int = 2, max_array: int = 100) -> Iterator[Cluster]:
    """A running cluster in a short temporary folder: a unix socket's path must fit 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    folder.chmod(0o755)
    here = Cluster(folder, nodes, max_array)
    try:
        here.start()
        # A process of its own, which stops the cluster when this one is killed.
        watch = subprocess.Popen(
            [sys.executable, "-c", STOP_AT_THE_END, str(Path(__file__).parent), str(folder), str(nodes)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield here
        finally:
            watch.communicate()
    finally:
        here.stop()
        shutil.rmtree(folder, ignore_errors=True)
