"""How several processes find each other, and how they notice that one has ended.

Every process but the first keeps a connection to the first one (`Line`). On it they say that they
have arrived at what only all can do together, and it closes when a process ends, however it ends.
So nobody waits for one that has stopped, and no time limit has to guess how long a step takes.
"""

import _thread
import json
import os
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta

from torch import distributed as dist

PATIENCE = 5, 300  # seconds to wait for the others in silence, and at all
GRACE = 10, 20  # seconds from a loss to an interruption, and from there to the end
HELLO, WORD = 512, 16  # bytes of a message
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes that srun or mpirun started


def several_processes() -> bool:
    world = os.environ.get("WORLD_SIZE", "1")
    return world.isdecimal() and int(world) > 1


def main_process() -> bool:
    return not several_processes() or os.environ.get("RANK") == "0"


def numbered(text: str) -> str:
    """A message, with the process's number if there are several."""
    return f"process {os.environ.get('RANK', '?')}: {text}" if several_processes() else text


def check_launch(device: str) -> None:
    """Raise ValueError if the environment does not say how to meet, or if several processes cannot
    share this kind of device."""
    if not several_processes():
        count = next((n for name in LAUNCHERS if (n := os.environ.get(name, "1")) != "1"), "1")
        if count != "1" and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"{count} processes were started that do not know each other, and all would write the same files: use "
                "one torchrun per machine, or give each its RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            )
        return
    rank, world, port = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    known = rank.isdecimal() and int(rank) < int(world) and os.environ.get("LOCAL_RANK", "0").isdecimal()
    if not (known and port.isdecimal() and 0 < int(port) < 65536 and os.environ.get("MASTER_ADDR")):
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        found = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise ValueError(
            f"WORLD_SIZE={world} announces other processes, but {found} cannot lead to them: start with torchrun, or "
            "unset WORLD_SIZE to run alone."
        )
    if not dist.is_available():
        raise ValueError("This build of torch cannot connect processes; start without torchrun.")
    if device == "mps":
        raise ValueError("Several processes cannot share a Mac's GPU: start without torchrun, or use --device cpu.")
    if device.startswith("cuda:"):
        raise ValueError(f"--device {device} would put every process on one GPU; use --device cuda.")


# --------------------------------------------------------------------------------------------------
# Meeting. All waits are in Python, so that a signal ends them.


def waiting(for_whom: Callable[[], str]) -> Iterator[None]:
    """Yield several times a second. Say on stderr for whom this process waits, if it takes long;
    raise ValueError if it takes too long (`PATIENCE`)."""
    start, said = time.monotonic(), False
    place = f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    while (waited := time.monotonic() - start) < PATIENCE[1]:
        yield
        if waited > PATIENCE[0] and not said:
            print(numbered(f"waiting for {for_whom()} {place}"), file=sys.stderr, flush=True)
            said = True
        time.sleep(0.1)
    raise ValueError(
        f"waited {PATIENCE[1]} s for {for_whom()} {place}: start all {os.environ['WORLD_SIZE']} processes, or unset "
        "WORLD_SIZE to run alone."
    )


def open_store(rank: int, world: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which the first process or torchrun serves. Raises
    ValueError."""
    host, port, reason = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), [""]
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    for _ in waiting(lambda: "process 0" + reason[-1]):
        try:
            if not own:
                socket.create_connection((host, port), timeout=2).close()
            break
        except OSError as error:
            reason.append(f" ({error.strerror or error})")
    try:
        libuv = sys.platform != "win32"  # its builds of torch come without
        limit = timedelta(seconds=30)
        store = dist.TCPStore(host, port, world, own, limit, wait_for_workers=False, use_libuv=libuv)
    except RuntimeError as error:
        what = "serve the other processes" if own else "meet process 0"
        why = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ValueError(f"Cannot {what} at {host}:{port}: {why}; choose another MASTER_PORT.") from None
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def connect(store: dist.Store, rank: int, world: int, gpu: str) -> "Line":
    """Connect every process with the first, once all have come.

    gpu: a name of this process's GPU that no other GPU has, or "". Raises ValueError if processes
    do not come, or two have the same GPU.
    """
    if rank > 0:
        for _ in waiting(lambda: "process 0"):
            if store.check(["first"]):
                break
        host, port, password = json.loads(store.get("first"))
        peer = socket.create_connection((host, port), timeout=30)
        peer.sendall(json.dumps([password, rank, gpu]).ljust(HELLO).encode())
        return Line({peer: 0})

    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world) as server:
        server.settimeout(0.1)
        password, peers, gpus = secrets.token_hex(), {}, {0: gpu}
        store.set("first", json.dumps([own_address(), server.getsockname()[1], password]))
        for _ in waiting(lambda: name_processes(set(range(world)) - set(gpus), world)):
            with suppress(OSError, ValueError):  # nobody, or a stranger
                peer, _ = server.accept()
                peer.settimeout(5)
                given, number, card = json.loads(peer.recv(HELLO, socket.MSG_WAITALL))
                if given == password and number not in gpus:
                    gpus[number], peers[peer] = card, number
            if len(gpus) == world:
                break
    same = [number for number in gpus if gpu and list(gpus.values()).count(gpus[number]) > 1]
    if same:
        raise ValueError(
            f"{name_processes(same, world)} have the same GPU; start as many processes as a machine has GPUs."
        )
    return Line(peers)


def own_address() -> str:
    """An address of this machine that the other processes can reach."""
    host = os.environ["MASTER_ADDR"]  # with torchrun not always this machine
    with socket.create_connection((host, int(os.environ["MASTER_PORT"])), timeout=30) as outward:
        own = outward.getsockname()[0]
    return host if own.startswith("127.") or own == "::1" else own


def name_processes(numbers: set[int], world: int) -> str:
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))} of 0 to {world - 1}"


class Line:
    """What connects this process with the first one, or the first with all others.

    peers: a connection to each, and its number. If one ends without having left, this process has
    `GRACE` seconds to notice, then it is interrupted as by SIGTERM; if it cannot even notice that,
    because it is in a call that does not return, it ends.
    """

    def __init__(self, peers: dict[socket.socket, int]):
        self.peers, self.heard, self.lost, self.noticed = peers, queue.SimpleQueue(), "", threading.Event()
        for peer in peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notice machines that vanish, too
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, option):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), 5)
        threading.Thread(target=self.listen, daemon=True).start()

    def meet(self, word: str = "here") -> None:
        """Wait until all processes are here. Raises ConnectionError if one has stopped."""
        first = 0 not in self.peers.values()
        if not first:
            self.say(word)
        for _ in self.peers:
            if lost := self.heard.get():
                self.noticed.set()
                raise ConnectionError(lost)
        if first:
            self.say(word)

    def say(self, word: str) -> None:
        for peer in self.peers:
            with suppress(OSError):  # it has stopped, which `listen` notices
                peer.sendall(word.ljust(WORD).encode())

    def listen(self) -> None:
        """In a thread: hear "here", "leave" and "lost" with a number, or that a connection ends."""
        peers = dict(self.peers)
        while peers:
            for peer in select.select(list(peers), [], [])[0]:
                try:
                    word, *number = peer.recv(WORD, socket.MSG_WAITALL).decode().split()
                except (OSError, ValueError):  # closed
                    word, number = "lost", [peers[peer]]
                if word == "lost":
                    return self.lose(*number)
                if word == "leave":
                    del peers[peer]
                self.heard.put("")

    def lose(self, number: int | str) -> None:
        self.lost = f"Process {number} has stopped."
        if len(self.peers) > 1:
            self.say(f"lost {number}")
        self.heard.put(self.lost)
        if self.noticed.wait(GRACE[0]):
            return
        _thread.interrupt_main(signal.SIGTERM)
        if not self.noticed.wait(GRACE[1]):
            print(numbered(self.lost), file=sys.stderr, flush=True)
            os._exit(1)

    def close(self) -> None:
        """Tell the others that this process ends, before the interpreter has taken itself down.
        That can hang on a GPU's communicator, so it gets half a minute."""
        self.noticed.set()
        for peer in self.peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        if hasattr(signal, "alarm"):
            signal.alarm(30)
