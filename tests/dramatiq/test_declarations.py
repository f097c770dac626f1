"""What cannot work is refused where it is written: the plugin added twice, an exactly_once in the
wrong place or of another kind.
"""

from __future__ import annotations

import re
from typing import Any

import dramatiq
import pytest
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ConnectionClosed
from dramatiq.middleware import MiddlewareError

from jobsync_celery import exactly_once as celery_once
from jobsync_core import exactly_once as core_once
from jobsync_core.config import CoordinationConfig
from jobsync_core.errors import ConfigurationError
from jobsync_core.ledger.current import set_current_ledger
from jobsync_dramatiq import JobSync, exactly_once
from tests.support.fakes import FakeLedger

CONFIG = CoordinationConfig(appname='shop_')


def new_broker(*more: dramatiq.Middleware) -> StubBroker:
    broker = StubBroker()
    for item in (JobSync(config=CONFIG), *more):
        broker.add_middleware(item)
    return broker


def work(n: int) -> int:
    return n


class TestAdded:
    def test_a_second_one_is_refused_at_the_first_actor(self) -> None:
        broker = new_broker(JobSync(config=CONFIG))
        with pytest.raises(
            ConfigurationError, match=r'JobSync is 2 times among the middleware .*: add it once'
        ):
            dramatiq.actor(broker=broker)(work)

    def test_one_that_comes_after_the_actors_is_refused_at_once(self) -> None:
        """As in a Django project that has it in its settings and adds it in ready(), too."""
        broker = new_broker()
        dramatiq.actor(broker=broker)(work)
        with pytest.raises(ConfigurationError, match='JobSync is 2 times'):
            broker.add_middleware(JobSync(config=CONFIG))

    def test_the_same_one_twice_is_refused(self) -> None:
        plugin = JobSync(config=CONFIG)
        broker = new_broker()
        broker.middleware.clear()
        broker.add_middleware(plugin)
        broker.add_middleware(plugin)
        with pytest.raises(ConfigurationError, match='JobSync is 2 times'):
            dramatiq.actor(broker=broker)(work)

    def test_a_worker_without_actors_does_not_start_with_two(self) -> None:
        with pytest.raises(MiddlewareError, match='JobSync is 2 times'):
            dramatiq.Worker(new_broker(JobSync(config=CONFIG, required=False))).start()

    def test_one_for_two_brokers_is_refused(self) -> None:
        plugin = JobSync(config=CONFIG)
        first, second = StubBroker(), StubBroker()
        first.add_middleware(plugin)
        second.add_middleware(plugin)
        dramatiq.actor(broker=first)(work)
        with pytest.raises(
            ConfigurationError, match=r'belongs to .* already, .* make one for each broker'
        ):
            dramatiq.actor(broker=second)(work)

    def test_an_actor_that_is_declared_after_a_refusal_is_refused_too(self) -> None:
        broker = new_broker(JobSync(config=CONFIG))
        for name in ('a', 'b'):
            with pytest.raises(ConfigurationError, match='2 times'):
                dramatiq.actor(broker=broker, actor_name=name)(work)


class TestOptions:
    @pytest.mark.parametrize('kind', ['function', 'class'])
    @pytest.mark.parametrize(
        ('given', 'told'),
        [
            ('jobsync_keys', "unknown actor option 'jobsync_keys': did you mean 'jobsync_key'?"),
            ('jobsync_pins', "unknown actor option 'jobsync_pins': did you mean 'jobsync_pin'?"),
            ('jobsync', "unknown actor option 'jobsync': "),
            ('jobsync_affinity', 'write @exactly_once(affinity=…) in its place'),
            ('jobsync_zzz', ': there are jobsync_key, jobsync_pin'),
        ],
    )
    def test_a_misspelt_one_is_refused_and_the_right_one_named(
        self, given: str, told: str, kind: str
    ) -> None:
        found, options = new_broker(), {given: '{n}'}

        def declare() -> None:
            if kind == 'function':
                dramatiq.actor(work, broker=found, **options)  # type: ignore[call-overload]  # whatever a user writes
            else:
                type(
                    'Work',
                    (dramatiq.GenericActor,),
                    {'Meta': type('Meta', (), {'broker': found, **options}), 'perform': work},
                )

        with pytest.raises(ConfigurationError, match=re.escape(told)):
            declare()

    def test_what_is_not_ours_dramatiq_refuses_and_what_other_middleware_adds_it_takes(
        self,
    ) -> None:
        class Other(dramatiq.Middleware):
            actor_options: Any = {'color'}  # noqa: RUF012

        for middleware in ([JobSync(config=CONFIG), Other()], [Other(), JobSync(config=CONFIG)]):
            found = StubBroker(middleware=middleware)
            dramatiq.actor(broker=found, color='red', jobsync_key='{n}')(work)
            with pytest.raises(ValueError, match='Did you forget to add a middleware'):
                dramatiq.actor(broker=found, actor_name='other', colour='red')(work)
        assert JobSync(config=CONFIG).actor_options == {'jobsync_key', 'jobsync_pin'}

    def test_a_message_that_says_them_is_told_of_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        actor: Any = dramatiq.actor(broker=new_broker(), actor_name='told_once')(work)
        for _ in range(3):
            actor.send_with_options(args=(1,), jobsync_keys='x')
            actor.send_with_options(args=(1,), jobsync_key='x', jobsync_waits=1, debounce='y')
        lines = [
            record.getMessage()
            for record in caplog.records
            if 'does nothing' in record.getMessage()
        ]
        told = (
            'the message option jobsync_keys does nothing; key and pin are options of the '
            'actor: @dramatiq.actor(jobsync_key=…)'
        )
        assert lines == [f'actor=told_once: {told}']


class TestScope:
    def test_it_is_the_actor_s_name_from_its_declaration_on_where_it_is_called_too(self) -> None:
        once = exactly_once(key='{n}')(work)
        actor: Any = dramatiq.actor(broker=new_broker(), actor_name='billing')(once)
        ledger = FakeLedger()
        set_current_ledger(ledger)
        try:
            actor(3)
        finally:
            set_current_ledger(None)
        assert ledger.keys == ['billing:3']

    def test_so_it_is_for_one_that_was_declared_before_the_plugin_was_added(self) -> None:
        broker = StubBroker()
        actor: Any = dramatiq.actor(broker=broker, actor_name='billing')(
            exactly_once(key='{n}')(lambda n: n)
        )
        broker.add_middleware(JobSync(config=CONFIG))
        assert actor.fn.exactly_once.ledger_key_of((3,), {}) == 'billing:3'

    def test_two_actors_of_one_function_are_refused_at_the_second(self) -> None:
        broker, once = new_broker(), exactly_once(key='{n}')(work)
        dramatiq.actor(broker=broker, actor_name='first')(once)
        with pytest.raises(
            ConfigurationError, match="'first' and 'second' run the same @exactly_once function"
        ):
            dramatiq.actor(broker=broker, actor_name='second')(once)


class TestDecorators:
    @pytest.mark.parametrize('kind', [core_once, celery_once], ids=['core', 'celery'])
    def test_another_s_exactly_once_is_refused_and_the_right_line_is_named(self, kind: Any) -> None:
        function = kind(key='{n}')(work)
        with pytest.raises(
            ConfigurationError, match=r"actor 'work' .*from jobsync_dramatiq import exactly_once"
        ):
            dramatiq.actor(broker=new_broker())(function)
        broker = StubBroker()
        dramatiq.actor(broker=broker)(function)
        with pytest.raises(ConfigurationError, match="actor 'work' "):
            broker.add_middleware(JobSync(config=CONFIG))  # the actor was there first

    @pytest.mark.parametrize('kind', [core_once, exactly_once], ids=['core', 'dramatiq'])
    def test_above_the_actor_it_is_refused_and_the_order_is_shown(self, kind: Any) -> None:
        made: Any = dramatiq.actor(broker=new_broker())(work)
        with pytest.raises(
            ConfigurationError,
            match=r'stands above @dramatiq\.actor, .*: write it below @dramatiq\.actor',
        ):
            kind(key='{n}')(made)

    def test_on_coroutines_too(self) -> None:
        @core_once(key='{n}', scope='test')
        async def run(n: int) -> int:
            return n

        with pytest.raises(ConfigurationError, match='from jobsync_dramatiq import exactly_once'):
            dramatiq.actor(broker=new_broker())(run)


class TestClasses:
    def test_keys_in_meta_are_those_of_perform(self) -> None:
        plugin = JobSync(config=CONFIG)
        found = StubBroker(middleware=[plugin])

        class Update(dramatiq.GenericActor):
            class Meta:
                broker = found
                jobsync_key = 'symbol:{symbol}'

            def perform(self, symbol: str, price: int = 0) -> None:
                """Nothing to do."""

        actor: Any = Update
        for message in (actor.message('EUR', 3), actor.message(symbol='EUR')):
            assert plugin.producer.actors.route_of(message) == 'symbol:EUR'

    def test_a_key_in_meta_may_be_a_function(self) -> None:
        plugin = JobSync(config=CONFIG)
        found = StubBroker(middleware=[plugin])

        class Update(dramatiq.GenericActor):
            class Meta:
                broker = found

                def jobsync_key(symbol: str) -> str:  # type: ignore[misc]  # Dramatiq takes it out of the class
                    return symbol.lower()

            def perform(self, symbol: str) -> None:
                """Nothing to do."""

        actor: Any = Update
        assert plugin.producer.actors.route_of(actor.message('EUR')) == 'eur'

    @pytest.mark.parametrize(
        'key',
        ['order:{order_id}', lambda self, order_id: f'order:{order_id}'],
        ids=['format', 'callable'],
    )
    def test_exactly_once_on_perform_is_routed_and_remembered(self, key: Any) -> None:
        plugin = JobSync(config=CONFIG)
        found = StubBroker(middleware=[plugin])
        ran: list[int] = []

        class Charge(dramatiq.GenericActor):
            class Meta:
                broker = found
                jobsync_pin = 'gpu-%'

            @exactly_once(key=key, scope='charge')
            def perform(self, order_id: int) -> int:
                ran.append(order_id)
                return order_id

        actor: Any = Charge
        coordination = plugin.producer.actors.find('Charge')
        assert coordination is not None and coordination.once is not None
        route = plugin.producer.actors.route_of(actor.message(17))
        assert route is not None and route.startswith('Charge#')
        assert (
            route
            == plugin.producer.actors.route_of(actor.message(order_id=17))
            != plugin.producer.actors.route_of(actor.message(18))
        )
        worker = dramatiq.Worker(found, worker_timeout=50, worker_threads=2)
        worker.start()
        try:
            for _ in range(3):
                actor.send(17)
            found.join('default', timeout=10_000)
            worker.join()
        finally:
            worker.stop()
        assert ran == [17]

    def test_another_s_exactly_once_on_perform_is_refused(self) -> None:
        found = new_broker()
        with pytest.raises(ConfigurationError, match='from jobsync_dramatiq import exactly_once'):

            class Charge(dramatiq.GenericActor):
                class Meta:
                    broker = found

                @core_once(key='order:{order_id}', scope='test')
                def perform(self, order_id: int) -> int:
                    return order_id


class TestSending:
    def test_a_message_goes_to_its_owner_s_queue_for_the_queue_that_it_is_sent_to(self) -> None:
        sent: list[str] = []

        class Recording:
            def send(self, message: Any, queue: str, *_: Any) -> None:
                sent.append(queue)

        plugin = JobSync(config=CONFIG)
        found = StubBroker(middleware=[plugin])
        actor: Any = dramatiq.actor(
            actor_name='mail', queue_name='mail', broker=found, jobsync_key='{n}'
        )(lambda n: None)
        vars(plugin.producer)['_broker'] = Recording()
        vars(plugin.producer.lookup)['queue_of'] = lambda route, home: f'{home}.of.{route}'
        actor.send(1)
        found.enqueue(actor.message(2).copy(queue_name='other'))
        assert sent == ['mail.of.1', 'other.of.2']

    def test_that_messages_go_to_their_home_queue_is_said_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Away:
            def send(self, *_: Any) -> None:
                raise ConnectionClosed(OSError('refused'))

        plugin = JobSync(config=CONFIG)
        found = StubBroker(middleware=[plugin])

        @dramatiq.actor(broker=found, jobsync_key='symbol:{symbol}')
        def update(symbol: str) -> None:
            """Nothing to do."""

        vars(plugin.producer)['_broker'] = Away()
        vars(plugin.producer.lookup)['queue_of'] = lambda route, home: f'{home}.jobsync.sync_.n1'
        for number in range(3):
            update.send(str(number))
        assert found.queues['default'].qsize() == 3
        assert len([line for line in caplog.messages if 'goes to its home queue' in line]) == 1
