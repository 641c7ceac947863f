# SPDX-License-Identifier: GPL-2.0-or-later
"""The client stand-in's quick start: a Perl script for the calls that a listener makes.

The real client is a small C program that starts in a millisecond. Python takes eight before its first line;
with a client that slow, every comparison would make one call for each connection look more expensive than
it is. Perl takes about one and a half, and nearly every Linux has it.

The script does what `client` does for sockets with plain options. For everything else, and for every error
before the call is made, it becomes the Python client, which says the same.
"""

import platform
import shutil
import subprocess
from pathlib import Path

from . import wire

# arch/*/entry/syscalls: the number of sendmsg(2). Perl has no other way to send descriptors without a module.
_SENDMSG = {"x86_64": 46, "aarch64": 211}
_TIMEOUT_S = 10.0
_PATH_MAX = 107
# Whether its numbers have 64 bits and its pointers too, as the script lays out structures.
_CHECK = "exit(length(pack('P Q', 'x', 1)) == 16 ? 0 : 1)"

_SCRIPT = r"""#!{perl}
# The lab's qrexec-client-vm, made by qvm-forward-lab. It loads no module: each would cost start-up time.
my @python = ({python});
my ($path, $single, $size, @rest) = ($ENV{{QUBES_LAB_AGENT_SOCKET}} // "", 0, {size}, @ARGV);

sub python {{ exec {{ $python[0] }} @python, @ARGV or die "$python[0]: $!\n" }}
sub is_stream {{ my $type = getsockopt($_[0], 1, 3); defined $type && unpack("i", $type) == 1 }}

while (@rest && $rest[0] =~ /^-./s) {{
    my $word = shift @rest;
    last if $word eq "--";
    if ($word =~ /^--agent-socket=(.+)\z/s) {{ $path = $1 }}
    elsif ($word eq "--use-stdin-socket" && !$single) {{ $single = 1 }}
    elsif ($word =~ /^--buffer-size=([1-9][0-9]{{0,8}})\z/) {{ $size = $1 }}
    else {{ python() }}
}}
python() if @rest != 2 || "@rest" =~ /[^ -~]/ || $path eq "" || length($path) > {path_max} || -t STDERR
    || !is_stream(\*STDIN) || !$single && !is_stream(\*STDOUT);
$rest[0] =~ tr/$/@/;
my $agent;
socket($agent, 1, 5, 0) && connect($agent, pack("S a*", 1, "$path\0")) or python();
setsockopt($agent, 1, 7, pack("i", {call_max}));

# struct msghdr with one part and the descriptors, on 64 bits.
my $call = join("\0", substr($rest[0], 0, 31), $rest[1], "", $size, "");
my @fds = $single ? (0) : (0, 1);
my $rights = pack("Q l l l*", 16 + 4 * @fds, 1, 1, @fds);
my $part = pack("P Q", $call, length $call);
my $message = pack("Q Q P Q P Q Q", 0, 0, $part, 1, $rights, length $rights, 0);
syscall({sendmsg}, fileno($agent), $message, 0) >= 0 or python();
close(STDIN);
close(STDOUT) unless $single;
$SIG{{PIPE}} = "IGNORE";

sub say_and_exit {{ my ($status, $text) = @_; syswrite(STDERR, $text); exit $status }}

recv($agent, my $packet, {packet_max}, 0);
say_and_exit({refused}, "Request refused\n") if $packet eq "";
say_and_exit({no_vchan_status}, substr($packet, 1)) if $packet =~ /^{no_vchan}/;
while (defined recv($agent, $packet, {packet_max}, 0) && $packet ne "") {{
    exit substr($packet, 1) if $packet =~ /^{exit}/;
    for (my $done = 1; $done < length $packet;) {{
        $done += syswrite(STDERR, $packet, length($packet) - $done, $done) // last;
    }}
}}
say_and_exit({lost}, "vchan connection closed early\n");
"""


def script(python: str, client: Path) -> str | None:
    """The script, which becomes ``python -IS client`` where need be; None where there is no Perl for it."""
    perl, sendmsg = shutil.which("perl"), _SENDMSG.get(platform.machine())
    if perl is None or sendmsg is None or " " in perl or not _is_fit(perl):
        return None
    return _SCRIPT.format(
        perl=perl,
        python=", ".join(_quoted(word) for word in (python, "-IS", str(client))),
        size=wire.BUFFER_SIZE,
        path_max=_PATH_MAX,
        call_max=wire.CALL_MAX,
        packet_max=wire.STDERR_MAX + 1,
        sendmsg=sendmsg,
        refused=wire.EXIT_REFUSED,
        no_vchan=wire.NO_VCHAN.decode(),
        no_vchan_status=wire.EXIT_NO_VCHAN,
        exit=wire.EXIT.decode(),
        lost=wire.EXIT_LOST,
    )


def _is_fit(perl: str) -> bool:
    try:
        done = subprocess.run([perl, "-e", _CHECK], capture_output=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _quoted(word: str) -> str:
    """As a Perl string in single quotes."""
    return "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"
