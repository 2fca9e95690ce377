"""What workers elsewhere are told of the store of whoever deploys them."""

from __future__ import annotations

from coldstart.deploy.variables import store_variables

STORE = {"COLDSTART_STORE": "s3://bucket", "COLDSTART_RECOVERY": "checkpoint"}
REPLICA = {"COLDSTART_REPLICA_ACCESS_KEY_ID": "id", "COLDSTART_REPLICA_SECRET_ACCESS_KEY": "planted"}


def test_replicas_that_can_be_reached_go_along():
    """A folder of this machine is no replica of a worker elsewhere; secrets of the others are named as such."""
    variables, secret = store_variables({**STORE, **REPLICA, "COLDSTART_STORE_REPLICAS": "/mnt/here,r2://other/prefix"})
    assert variables == {**STORE, **REPLICA, "COLDSTART_STORE_REPLICAS": "r2://other/prefix"}
    assert secret == set(REPLICA)
    assert store_variables({**STORE, "COLDSTART_STORE_REPLICAS": "/mnt/here"})[0] == STORE


def test_without_a_remote_store_nothing_else_goes_along():
    """Workers of a folder's store have one of their own."""
    variables, secret = store_variables({**REPLICA, "COLDSTART_STORE": "/folder", "COLDSTART_STORE_REPLICAS": "s3://b"})
    assert (variables, secret) == ({"COLDSTART_STORE": "/folder"}, set())
