"""Several devices and hosts: partitioning, hosts, preemption."""
