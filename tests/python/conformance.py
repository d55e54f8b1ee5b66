"""The cases that every client of `pelton/1` can carry out: `conformance.py ADDRESS FINGERPRINT`.

The same six are in tests/tests/conformance.rs for the Rust client.
"""

import asyncio
import sys
import uuid

import pelton
from pelton import connect, within

PATIENCE = 20


def fresh(what):
    """A name that no other case uses."""
    return f"{what}-{uuid.uuid4().hex[:12]}"


class Server:
    def __init__(self, address, fingerprint):
        self.address = address
        self.fingerprint = fingerprint

    def connect(self):
        return connect(self.address, self.fingerprint)


async def make(session, function):
    fields = {"function": function, "backoff_ms_min": 1, "backoff_ms_max": 2}
    made = await session.query(pelton.FUNCTION_SET, fields)
    assert made["function"] == function, made


async def submit(server):
    async with server.connect() as caller:
        welcome = await caller.hello()
        assert welcome["tenant"] == "default" and welcome["payload_bytes_max"] > 0, welcome
        function = fresh("submit")
        try:
            await caller.query(pelton.GET, {"task": pelton.name(1)})
            raise AssertionError("that task is not there")
        except pelton.Refused as refused:
            assert refused.code == pelton.NOT_FOUND, refused
        _, (unknown,) = await caller.submit(function, [("", b"x")])
        assert unknown.code == pelton.NOT_FOUND and unknown.text, unknown
        await make(caller, function)
        tasks = [("", f"payload {n}".encode()) for n in range(100)]
        _, answers = await caller.submit(function, tasks)
        assert all(answer.code == pelton.OK for answer in answers), answers
        assert len({answer.request_id for answer in answers}) == 100
        for answer, (_, payload) in list(zip(answers, tasks))[::33]:
            task = await caller.query(pelton.GET, {"task": pelton.name(answer.request_id)})
            assert task["status"] == "Enqueued", task
            assert task["task_payload"].encode() == payload, task


async def execute(server):
    async with server.connect() as caller, server.connect() as executor:
        await caller.hello()
        await executor.hello(executor=uuid.uuid4().int >> 64)
        function = fresh("execute")
        assert await executor.register([(function, 2)]) == [pelton.OK]
        tag, (good, bad) = await caller.submit(function, [("good", b"abc"), ("", b"def")], notify=True)
        attempts = []
        while len(attempts) < 2:
            attempts += await executor.execute()
        for attempt in attempts:
            assert attempt.function == 0 and attempt.lease.attempt == 1, attempt
            if attempt.lease.request_id == good.request_id:
                assert (attempt.task_id, attempt.payload) == ("good", b"abc"), attempt
                code = await executor.outcome(attempt.lease, pelton.SUCCEEDED, result=b"ABC")
            else:
                assert (attempt.task_id, attempt.payload) == ("", b"def"), attempt
                code = await executor.outcome(attempt.lease, pelton.FAILED, error="once")
            assert code == pelton.OK, code
        assert await executor.heartbeat([]) == []
        (retry,) = await executor.execute()
        assert retry.lease.request_id == bad.request_id and retry.lease.attempt == 2, retry
        assert await executor.outcome(retry.lease, pelton.SUCCEEDED) == pelton.OK
        ends = {}
        while len(ends) < 2:
            ends |= {finished.request_id: finished for finished in await caller.finished()}
        end = ends[good.request_id]
        assert (end.submit_tag, end.status, end.result) == (tag, pelton.STATUS_SUCCEEDED, b"ABC"), end
        assert ends[bad.request_id].attempts == 2, ends
        waited = await caller.wait(good.request_id, 0)
        assert waited.result == b"ABC", waited


async def duplicate(server):
    async with server.connect() as caller, server.connect() as other:
        await caller.hello()
        await other.hello()
        function = fresh("duplicate")
        await make(caller, function)
        _, (first,) = await caller.submit(function, [("order-1", b"10")])
        assert first.code == pelton.OK and not first.duplicate, first
        _, (again,) = await other.submit(function, [("order-1", b"10")])
        assert again.duplicate and again.request_id == first.request_id, again
        _, (reused, fine) = await other.submit(function, [("order-1", b"11"), ("order-2", b"11")])
        assert reused.code == pelton.ID_REUSED and reused.request_id == first.request_id, reused
        assert fine.code == pelton.OK and not fine.duplicate, fine


async def throttle(server):
    # A tenant of its own: what is throttled narrows the tenant's queue for a while.
    tenant = fresh("tenant")
    async with server.connect() as caller, server.connect() as executor:
        await caller.hello(tenant=tenant)
        await executor.hello(executor=uuid.uuid4().int >> 64, tenant=tenant)
        function = fresh("throttle")
        await make(caller, function)
        assert await executor.register([(function, 1)]) == [pelton.OK]
        _, (task,) = await caller.submit(function, [("", b"x")], notify=True)
        (attempt,) = await executor.execute()
        start = asyncio.get_running_loop().time()
        await executor.outcome(attempt.lease, pelton.THROTTLED, retry_after_ms=300)
        (second,) = await executor.execute()
        assert asyncio.get_running_loop().time() - start >= 0.29
        assert second.lease.attempt == 2, second
        await executor.outcome(second.lease, pelton.SUCCEEDED, result=b"y")
        (finished,) = await caller.finished()
        assert (finished.request_id, finished.attempts) == (task.request_id, 2), finished


async def stop(server):
    async with server.connect() as caller, server.connect() as executor:
        await caller.hello()
        function = fresh("stop")
        await make(caller, function)
        _, (waiting,) = await caller.submit(function, [("", b"x")])
        assert await caller.stop(waiting.request_id) == (pelton.OK, pelton.STATUS_STOPPED)
        code, _ = await caller.stop(waiting.request_id)
        assert code == pelton.FAILED_PRECONDITION, code
        code, _ = await caller.stop(1)
        assert code == pelton.NOT_FOUND, code

        await executor.hello(executor=uuid.uuid4().int >> 64)
        await executor.register([(function, 1)])
        _, (running,) = await caller.submit(function, [("", b"y")], notify=True)
        (attempt,) = await executor.execute()
        assert attempt.lease.request_id == running.request_id, "the stopped one is not handed out"
        code, status = await caller.stop(running.request_id, grace_ms=5_000)
        assert code == pelton.OK and status in (pelton.STATUS_STOPPING, pelton.STATUS_STOPPED)
        assert await executor.cancelled() == [attempt.lease]
        assert await executor.outcome(attempt.lease, pelton.STOPPED) == pelton.OK
        (finished,) = await caller.finished()
        assert finished.status == pelton.STATUS_STOPPED, finished


async def reconnect(server):
    function, identity = fresh("reconnect"), uuid.uuid4().int >> 64
    async with server.connect() as caller:
        await caller.hello()
        async with server.connect() as executor:
            await executor.hello(executor=identity)
            await executor.register([(function, 2)])
            _, answers = await caller.submit(function, [("", b"x"), ("", b"y")])
            leases = []
            while len(leases) < 2:
                leases += [attempt.lease for attempt in await executor.execute()]
        async with server.connect() as executor:
            await executor.hello(executor=identity)
            foreign = pelton.Lease(leases[0].request_id, leases[0].generation, leases[0].attempt + 1)
            # The second one is not presented: it was lost on the way, and comes again.
            assert await executor.resume([leases[0], foreign]) == [pelton.KEPT, pelton.REFUSED]
            assert await executor.register([(function, 2)]) == [pelton.OK]
            assert await executor.outcome(leases[0], pelton.SUCCEEDED, result=b"kept") == pelton.OK
            (again,) = await executor.execute()
            assert again.lease.request_id == leases[1].request_id, again
            assert again.lease != leases[1], "a lease of its own"
            assert await executor.outcome(leases[1], pelton.SUCCEEDED) == pelton.STALE_LEASE
            assert await executor.outcome(again.lease, pelton.SUCCEEDED, result=b"again") == pelton.OK
        ends = {answer.request_id: await caller.wait(answer.request_id, 10_000) for answer in answers}
        assert ends[leases[0].request_id].result == b"kept", ends
        assert ends[leases[1].request_id].result == b"again", ends


async def main():
    server = Server(*sys.argv[1:3])
    for case in (submit, execute, duplicate, throttle, stop, reconnect):
        await within(PATIENCE, case(server))
        print(f"{case.__name__}: ok", flush=True)


asyncio.run(main())
