"""The names of Services for a process of a pod: the stand-in for the cluster's DNS. Python imports it at its start."""

import json
import os
import socket

_look_up = socket.getaddrinfo


def _named(host, port, *args, **kwargs):
    with open(os.environ["STAND_IN_NAMES"]) as file:
        found = json.load(file)
    if host not in found:
        return _look_up(host, port, *args, **kwargs)
    if not found[host]:
        raise socket.gaierror(socket.EAI_NONAME, f"{host} has no address")
    return [answer for address in found[host] for answer in _look_up(address, port, *args, **kwargs)]


socket.getaddrinfo = _named
