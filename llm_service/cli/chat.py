"""A chat in the terminal: streamed answers, what they cost, the balance in the prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import grpc
from creditmesh.common.v1 import billing_pb2
from creditmesh.llm.v1 import chat_pb2, llm_service_pb2, llm_service_pb2_grpc
from creditmesh.tokenstore.v1 import balance_service_pb2, balance_service_pb2_grpc
from grpc_status import rpc_status

from servicekit.cli import Client, add_client_options, credits_text
from servicekit.rpc.status import error_info_of

HELP = """/model NAME   ask another model (alias)      /system TEXT  say how it should answer
/cost         what this chat has cost        /new          forget what was said
/help         this                           /quit         leave (so does Ctrl-D); Ctrl-C stops an answer"""
DIM, PLAIN = "\033[2m", "\033[0m"
SECONDS = 600.0
BALANCE_SECONDS = 2.0


@dataclass
class ChatSession:
    """One chat. `calls` and `balances` are synchronous stubs; balances None = not asked for."""

    calls: Any
    balances: Any
    user: str
    out: TextIO
    model: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    is_coloured: bool = False
    messages: list[chat_pb2.Message] = field(default_factory=list)
    spent_micros: int = 0
    tokens: int = 0
    rounds: int = 0

    def prompt(self) -> str:
        """E.g. `alice 98.53 credits (pro) > `."""
        balance = self.balance_text()
        return f"{self.user}{f' {balance} credits' if balance else ''} ({self.model or 'pro'}) > "

    def balance_text(self) -> str:
        if self.balances is None:
            return ""
        try:
            request = balance_service_pb2.GetBalanceRequest(user_id=self.user)
            answer = self.balances.GetBalance(request, timeout=BALANCE_SECONDS, metadata=self.metadata)
        except grpc.RpcError:
            return "?"
        return credits_text(answer.balance.available_micros)

    def handle(self, line: str) -> bool:
        """A line of the user. Answers False when it is time to leave."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/quit" | "/exit":
                return False
            case "/model":
                self.model = rest.strip()
                self._say(f"asking {self.model or 'pro'} from now on")
            case "/system":
                self.messages = [each for each in self.messages if each.role != chat_pb2.ROLE_SYSTEM]
                if rest.strip():
                    self.messages.insert(0, _message(chat_pb2.ROLE_SYSTEM, rest.strip()))
                self._say("noted" if rest.strip() else "no instructions any more")
            case "/cost":
                self._say(f"{self.rounds} answers, {self.tokens} tokens, {credits_text(self.spent_micros)} credits")
            case "/new":
                self.messages.clear()
                self._say("forgotten")
            case "/help":
                self._say(HELP)
            case _:
                self._say(f"there is no {command}; /help tells what there is")
        return True

    def ask(self, text: str) -> None:
        """Asks and shows the answer as it comes. An answer that is stopped is charged for what came."""
        self.messages.append(_message(chat_pb2.ROLE_USER, text))
        request = llm_service_pb2.StreamRequest(
            billing=billing_pb2.BillingContext(user_id=self.user, scene="chat"), model=self.model,
            messages=self.messages,
        )
        answer: list[str] = []
        stream = self.calls.Stream(request, timeout=SECONDS, metadata=self.metadata)
        try:
            for event in stream:
                self._show(event, answer)
        except KeyboardInterrupt:
            stream.cancel()
            self._say("\nstopped; what came is charged")
        except grpc.RpcError as error:
            if not answer:
                self.messages.pop()
            self._say(f"\n{_reason_of(error)}")
        if answer:
            self.messages.append(_message(chat_pb2.ROLE_ASSISTANT, "".join(answer)))

    def _show(self, event: Any, answer: list[str]) -> None:
        if event.HasField("delta"):
            if event.delta.reasoning:
                self._write(self._dim(event.delta.reasoning))
            if event.delta.text:
                answer.append(event.delta.text)
                self._write(event.delta.text)
            if event.delta.HasField("tool_call_delta"):
                call = event.delta.tool_call_delta
                self._write(self._dim(f"[{call.name}] {call.arguments}" if call.name else call.arguments))
        elif event.HasField("finished"):
            finished = event.finished
            self.spent_micros += finished.charge.credit_micros
            self.tokens += finished.usage.input_tokens + finished.usage.output_tokens
            self.rounds += 1
            reason = chat_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_")
            why = "" if reason == "STOP" else f", {reason}"
            fallback = ", another model than the first choice" if finished.fallback else ""
            self._say("\n" + self._dim(
                f"{finished.usage.input_tokens} + {finished.usage.output_tokens} tokens,"
                f" {credits_text(finished.charge.credit_micros)} credits{why}{fallback}"
            ))

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self.is_coloured else text

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _say(self, text: str) -> None:
        self._write(f"{text}\n")


def _message(role: chat_pb2.Role.ValueType, text: str) -> chat_pb2.Message:
    return chat_pb2.Message(role=role, content=[chat_pb2.Content(text=text)])


def _reason_of(error: Any) -> str:
    status = rpc_status.from_call(error)
    info = error_info_of(status) if status else None
    return f"{info.reason if info else error.code().name}: {error.details()}"


def _channel(target: str, client: argparse.Namespace) -> Any:
    """A synchronous one; the stubs' types describe asyncio."""
    if client.ca_file is None:
        return grpc.insecure_channel(target)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(client.ca_file.read_bytes()))


def run(arguments: argparse.Namespace, read_line: Callable[[str], str] = input) -> None:
    """Reads lines until there are no more."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history for input()
    metadata = Client.metadata_of(arguments)
    calls = _channel(arguments.target, arguments)
    balances = _channel(arguments.tokenstore, arguments) if arguments.tokenstore else None
    session = ChatSession(
        llm_service_pb2_grpc.LLMServiceStub(calls),
        balance_service_pb2_grpc.BalanceServiceStub(balances) if balances else None,
        arguments.user, sys.stdout, arguments.model, metadata, sys.stdout.isatty(),
    )
    sys.stdout.write("/help tells the commands.\n")
    try:
        while session.handle(read_line(session.prompt())):
            pass
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
    finally:
        for channel in (calls, balances):
            if channel is not None:
                channel.close()


def add_to(commands: Any, target: str) -> None:
    """Adds chat."""
    chat = commands.add_parser("chat", help="chat in the terminal")
    chat.add_argument("user")
    chat.add_argument("--model", default="", help="alias; empty = pro")
    chat.add_argument(
        "--tokenstore", default="127.0.0.1:50052", help="for the balance; empty = not shown (%(default)s)"
    )
    add_client_options(chat, target=target)
    chat.set_defaults(run=run)
