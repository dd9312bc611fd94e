"""A Slurm of one node with munge in a folder of its own; nothing of the system is changed.

The Debian packages are unpacked, not installed. The clients run through scripts that name the
configuration, because jobs do not inherit `SLURM_CONF` from Snakemake's plugin.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = (
    "libhwloc15",
    "liblz4-1",
    "libmunge2",
    "libnuma1",
    "munge",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "slurmctld",
    "slurmd",
)
CLIENTS = ("sacct", "sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
LIBRARIES = "usr/lib/x86_64-linux-gnu"

# Memory is polled each second. Control groups enforce it on most clusters; they need root.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={control_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=1
MinJobAge=86400
ReturnToService=2
SlurmdTimeout=20
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""


class Missing(Exception):
    """Why Slurm cannot be started here."""


def unpack(folder: Path) -> Path:
    """Download and unpack the packages once; return the root they are unpacked into."""
    root = folder / "root"
    if root.is_dir():
        return root
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise Missing("apt-get and dpkg are needed to download Slurm")
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["apt-get", "download", *PACKAGES], cwd=packages, capture_output=True, text=True
    )
    if done.returncode:
        raise Missing(f"apt-get download: {' '.join(done.stderr.split())[-300:]}")
    unpacked = folder / "unpacking"
    for package in sorted(packages.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, unpacked], check=True, capture_output=True)
    unpacked.rename(root)
    return root


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


class Slurm:
    """Slurm and munge, running from `folder`."""

    def __init__(self, root: Path, folder: Path, cpus: int = 4, memory_mb: int = 24_000) -> None:
        self.root, self.folder = root, folder
        self.bin = folder / "bin"
        self.host = socket.gethostname().split(".")[0]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("bin", "state", "spool"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=self.host,
                user=subprocess.check_output(["id", "-un"], text=True).strip(),
                folder=folder,
                plugins=root / LIBRARIES / "slurm-wlm",
                control_port=free_port(),
                node_port=free_port(),
                cpus=cpus,
                memory_mb=memory_mb,
            )
        )
        # A device that exists everywhere stands for the GPU.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/zero AutoDetect=off\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        libraries = f"{root / LIBRARIES}:{root / LIBRARIES / 'slurm-wlm'}"
        for name in CLIENTS:
            self._script(name, root / "usr/bin" / name, libraries)
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            self._script(name, root / "usr/sbin" / f"{name}-wlm", libraries)
        self._script("munged", root / "usr/sbin/munged", libraries)

    def _script(self, name: str, program: Path, libraries: str) -> None:
        # The loader takes the libraries as an argument, so that jobs do not inherit them.
        script = self.bin / name
        loader = "/lib64/ld-linux-x86-64.so.2"
        script.write_text(
            f"#!/bin/sh\nexport SLURM_CONF={self.folder}/slurm.conf\n"
            f'exec {loader} --library-path {libraries} --argv0 {name} {program} "$@"\n'
        )
        script.chmod(0o755)

    def client(self, *words: str, check: bool = True) -> str:
        """Run a client; return what it printed."""
        done = subprocess.run(
            [self.bin / words[0], *words[1:]], capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str) -> None:
        """Start munged, slurmctld or slurmd in the foreground of a process of its own."""
        words = {
            "munged": [
                *("--foreground", "--force", "--key-file", "munge.key", "--socket", "munge.socket"),
                *("--pid-file", "munged.pid", "--log-file", "munged.log"),
                *("--seed-file", "munged.seed"),
            ],
            "slurmctld": ["-D", "-f", f"{self.folder}/slurm.conf"],
            "slurmd": [
                *("-D", "-f", f"{self.folder}/slurm.conf", "-N", self.host),
                *("-d", f"{self.bin}/slurmstepd"),
            ],
        }[name]
        own = [str(self.folder / word) if word.startswith("munge") else word for word in words]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [self.bin / name, *own], stdout=out, stderr=out, start_new_session=True
            )

    def stop(self, name: str) -> None:
        """Stop one of them."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def jobs(self) -> list[dict[str, str]]:
        """Return the record of every job that the controller has."""
        text = self.client("scontrol", "show", "jobs", "--oneliner")
        return [
            dict(re.findall(r"(\S+?)=(\S*)", line))
            for line in text.splitlines()
            if "JobId=" in line
        ]


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until a condition is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"after {seconds:.0f} s: {what}"
        time.sleep(0.5)


@contextlib.contextmanager
def running(root: Path, folder: Path) -> Iterator[Slurm]:
    """A Slurm that accepts jobs; all its processes are stopped at the end."""
    slurm = Slurm(root, folder)
    try:
        slurm.start("munged")
        wait_for((folder / "munge.socket").exists, "munged has no socket", 20)
        slurm.start("slurmctld")
        slurm.start("slurmd")
        wait_for(
            lambda: "idle" in slurm.client("sinfo", "-h", "-o", "%T", check=False),
            "the node is not idle",
        )
        yield slurm
    finally:
        if "slurmctld" in slurm.processes:
            slurm.client("scancel", "--full", "--quiet", "--state=RUNNING", check=False)
            time.sleep(1)
        for name in reversed(list(slurm.processes)):
            slurm.stop(name)
