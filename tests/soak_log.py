"""What the processes of a run have noted in a folder; see soak_process.py."""
import collections
import dataclasses
import json
import pathlib


@dataclasses.dataclass
class Process:
    """What one has noted. `launch` counts the commands, `attempt` tells those started together from others."""
    pid: int
    index: int
    attempt: str
    launch: int
    phases: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    batches: list[dict] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """The last one begun, -1 before the first."""
        return self.batches[-1]['step'] if self.batches else -1

    @property
    def alive(self) -> bool:
        try:
            return pathlib.Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
        except FileNotFoundError:
            return False


class Log:
    """All processes of a run, in the order in which they began."""

    def __init__(self, folder):
        self.folder, self._files = pathlib.Path(folder), {}
        self.folder.mkdir(parents=True)
        self.processes: list[Process] = []

    def read(self, launch) -> bool:
        """Takes in what has been noted since; whether there was anything."""
        news = False
        for path in sorted(self.folder.iterdir()):
            if path not in self._files:
                self._files[path] = path.open('rb'), []
            file, entry = self._files[path]
            text = file.read()
            whole = text.rfind(b'\n') + 1
            file.seek(whole - len(text), 1)
            for line in text[:whole].splitlines():
                news, line = True, json.loads(line)
                if not entry:
                    entry.append(Process(line['pid'], line['index'], line['attempt'], launch))
                    self.processes.append(entry[0])
                if 'phase' in line:
                    entry[0].phases.append((line['time'], line['phase']))
                else:
                    entry[0].batches.append(line)
        return news

    @property
    def attempts(self) -> dict[str, list[Process]]:
        """Processes that were started together, in order."""
        found = collections.defaultdict(list)
        for process in self.processes:
            found[process.attempt].append(process)
        return {attempt: sorted(processes, key=lambda p: p.index) for attempt, processes in found.items()}

    def current(self) -> list[Process]:
        """Those that were started last."""
        return list(self.attempts.values())[-1] if self.processes else []
