from node.openmp import choose_waiting


def test_threads_sleep_on_a_busy_machine_and_spin_briefly_on_an_idle_one():
    busy: dict[str, str] = {}
    choose_waiting(busy, load_per_cpu=0.9)
    assert busy == {"OMP_WAIT_POLICY": "PASSIVE"}
    idle: dict[str, str] = {}
    choose_waiting(idle, load_per_cpu=0.1)
    assert idle == {"GOMP_SPINCOUNT": "1000"}


def test_the_users_choice_stands():
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        environment = dict(own)
        choose_waiting(environment, load_per_cpu=2.0)
        assert environment == own
