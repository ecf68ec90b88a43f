"""The address of a network interface, and the interface of an address (IPv4, Linux)."""

import fcntl
import socket
import struct

from protocol.errors import ConfigError

_SIOCGIFADDR = 0x8915
_ADDRESS = slice(20, 24)  # of a struct ifreq that holds a struct sockaddr_in


def address_of(interface: str) -> str:
    """The IPv4 address of an interface.

    Raises:
        ConfigError: there is no such interface, or it has no address.
    """
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            return socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[_ADDRESS])
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ConfigError(
                f"--transfer-interface {interface}: {error.strerror}; this machine has {known}"
            ) from error


def interface_of(address: str) -> str:
    """The interface that has an IPv4 address.

    Raises:
        ConfigError: none has.
    """
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except ConfigError:  # an interface without an address
            continue
    raise ConfigError(f"no interface has the address {address}: name one with --transfer-interface")
