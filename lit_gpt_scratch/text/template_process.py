"""Render a chat template in a separate process, with limits on time, memory and output length."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import parse_json

WORKER: Final = Path(__file__).with_name("template_worker.py")
RENDER_SECONDS: Final = 2
"""Maximum CPU time per request in seconds."""
RENDER_MEMORY: Final = 2**29
"""Maximum address space of the process in bytes."""
RENDER_TIMEOUT: Final = 60
"""Maximum elapsed time per request in seconds; on a busy machine, elapsed time exceeds CPU time."""
MAX_TEMPLATE: Final = 2**18
"""Maximum number of characters in a template; published templates have up to 20,000."""
MAX_ANSWER: Final = 2**27
"""Maximum size of an answer in bytes; sufficient even if JSON escapes every character of a text of maximum length."""
REMEDY: Final = (
    "edit chat_template.jinja in the model's Hugging Face folder, or delete it to use the template of this package, "
    "and import the model again"
)


class TemplateProcess:
    """Process that renders a chat template; started by the first request and killed when this object is deleted.

    Args:
        template: Jinja template.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle: only the template, because a copy starts its own process."""
        return {"template": self.template, "_process": None}

    def render(self, contexts: Sequence[dict[str, Any]]) -> list[str]:
        """Render the template once per context; each context maps the template's variables to their values.

        Raises:
            UserError: The template is invalid, rejects the messages, or exceeds a limit.
        """
        if len(self.template) > MAX_TEMPLATE:
            raise _template_error(f"it has more than {MAX_TEMPLATE:,} characters")
        if self._process is None:
            command = [sys.executable, str(WORKER), str(RENDER_SECONDS), str(RENDER_MEMORY)]
            self._process = subprocess.Popen(  # in its own session, so that Ctrl-C in a chat does not reach it
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            weakref.finalize(self, _end_process, self._process, os.getpid())
            self._request(self._process, self.template)
        return self._request(self._process, contexts)

    def _request(self, process: "subprocess.Popen[bytes]", value: Any) -> list[str]:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(RENDER_TIMEOUT, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(value).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(MAX_ANSWER)
        except OSError:  # the process has exited
            line = b""
        finally:
            timer.cancel()
        try:
            answer = parse_json(line, dict[str, str | list[str]], MAX_ANSWER)
        except ValueError as error:
            answer = {"error": str(error) if line.endswith(b"\n") else "it takes too much time or memory"}
        if isinstance(texts := answer.get("texts"), list):
            return texts
        if "rejected" in answer:
            raise UserError(
                f"the chat template of the model rejects the messages: {answer['rejected']}; change the messages"
            )
        _end_process(process, os.getpid())
        self._process = None
        raise _template_error(str(answer.get("error")))


def _end_process(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() == owner:  # not in a fork, such as a data loader worker
        process.kill()
        process.communicate()


def _template_error(reason: str) -> UserError:
    return UserError(f"the chat template of the model cannot be used: {reason}; {REMEDY}")
