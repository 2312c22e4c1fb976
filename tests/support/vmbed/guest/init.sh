#!/bin/busybox sh
# The guest's only program: it brings the machine up and then serves commands on the second serial port.
#
# A command is one line, `VERB ARG...`; its answer is any number of lines and then `@@EXIT STATUS`.
# `@@READY UPTIME` says that commands are taken; it comes once per boot. The kernel's own messages go
# to the first serial port, so nothing is mixed into an answer.

/bin/busybox mkdir -p /bin /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || echo "vmbed: module $module does not load" >/dev/console
done

CONTROL=/dev/ttyS1
MIB=1048576

# --- helpers

nvme_functions() { # PCI addresses of all NVMe functions, in order; without a process, for each costs 20 ms here
    for function in /sys/bus/pci/devices/*; do
        read -r class <"$function/class"
        case $class in 0x0108*) echo "${function##*/}" ;; esac
    done
}

nth_function() { # N: the N-th NVMe function's PCI address
    set -- "${1:-0}" $(nvme_functions)
    [ $# -gt $(($1 + 1)) ] || { echo "no NVMe function number $1 ($(($# - 1)) found)" >&2; return 1; }
    shift $(($1 + 1))
    echo "$1"
}

controller_of() { # ADDRESS: nvme0 or the like
    ls "/sys/bus/pci/devices/$1/nvme" 2>/dev/null
}

block_device() { # N: the device node of the first namespace of the N-th function
    address=$(nth_function "$1") || return 1
    for tries in $(seq 1000); do
        for node in "/sys/bus/pci/devices/$address"/nvme/nvme*/nvme*n*; do
            [ -b "/dev/${node##*/}" ] && { echo "/dev/${node##*/}"; return 0; }
        done
        usleep 10000 # the driver scans namespaces from a work item that user space cannot wait for
    done
    echo "no namespace of function ${1:-0} appeared" >&2
    return 1
}

# A pattern that is different at every place and for every seed: numbered lines that start at the seed's number, again and
# again. The length of one round is a prime above one MiB, so no two sectors of 512 MiB are equal. Cheap, because an
# emulated CPU makes it.
PERIOD=1048583
pattern() { # SEED MIB: that many MiB at the least
    base=/tmp/base.$1
    [ -f "$base" ] || seq $((100000000 + $1 * 200000)) 999999999 2>/dev/null |
        dd "of=$base" bs=$PERIOD count=1 iflag=fullblock status=none
    rounds=
    for round in $(seq "$2"); do rounds="$rounds $base"; done
    # shellcheck disable=SC2086 # the rounds are words
    cat $rounds 2>/dev/null # which ends in a broken pipe
}

# --- commands

cmd_ident() { # [N]: what the driver read from the function
    address=$(nth_function "${1:-0}") || return 1
    device=$(block_device "${1:-0}") || return 1
    controller=/sys/class/nvme/$(controller_of "$address")
    echo "address=$address"
    for key in vendor device class; do echo "$key=$(cat "/sys/bus/pci/devices/$address/$key")"; done
    for key in model serial firmware_rev state queue_count cmb cmbloc cmbsz; do
        [ -r "$controller/$key" ] && echo "$key=$(head -n 1 "$controller/$key" | sed 's/ *$//')"
    done
    echo "namespace=$device"
    echo "bytes=$(($(cat "/sys/class/block/${device##*/}/size") * 512))"
}

cmd_write() { # SEED MIB [N]: write the pattern, past the page cache
    device=$(block_device "${3:-0}") || return 1
    pattern "$1" "$2" | dd "of=$device" bs=1M "count=$2" iflag=fullblock oflag=direct conv=fsync 2>&1
}

cmd_read() { # MIB [N]: read, past the page cache, and print the MD5, the cheapest of this machine's digests
    device=$(block_device "${2:-0}") || return 1
    echo "md5 $(dd "if=$device" bs=1M "count=$1" iflag=direct 2>/tmp/read.log | md5sum)"
    cat /tmp/read.log
}

cmd_irqs() { # interrupts of the nvme driver so far: one line per vector, summed over the CPUs
    awk '/nvme/ { sum = 0; for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i; print $NF, sum }' /proc/interrupts
}

cmd_rebind() { # [N]: take the driver off the function and put it on again
    address=$(nth_function "${1:-0}") || return 1
    echo "$address" >/sys/bus/pci/drivers/nvme/unbind || return 1
    [ -e "/sys/bus/pci/devices/$address/driver" ] && return 1
    echo "$address" >/sys/bus/pci/drivers/nvme/bind || return 1
    block_device "${1:-0}"
}

cmd_reset() { # [N]: reset the PCI function while the driver is bound
    address=$(nth_function "${1:-0}") || return 1
    cat "/sys/bus/pci/devices/$address/reset_method"
    echo 1 >"/sys/bus/pci/devices/$address/reset" || return 1
    block_device "${1:-0}"
}

cmd_reset_controller() { # [N]: reset the NVMe controller through the driver
    address=$(nth_function "${1:-0}") || return 1
    echo 1 >"/sys/class/nvme/$(controller_of "$address")/reset_controller" || return 1
    block_device "${1:-0}"
}

cmd_state() { # [N]: the controller's state by the driver; `live` is the good one
    address=$(nth_function "${1:-0}") || return 1
    cat "/sys/class/nvme/$(controller_of "$address")/state"
}

cmd_p2pmem() { # [N]: bytes of a controller memory buffer that are free, and that there are
    address=$(nth_function "${1:-0}") || return 1
    cat "/sys/bus/pci/devices/$address/p2pmem/available" "/sys/bus/pci/devices/$address/p2pmem/size"
}

cmd_count() { nvme_functions | wc -l; }
cmd_dmesg() { dmesg; }
cmd_sh() { eval "$*"; }
cmd_reboot() { reboot -f; }
cmd_poweroff() { poweroff -f; }

# --- somebody at the console

if grep -q vmbed.shell /proc/cmdline; then
    {
        node=$(block_device 0) && echo "The function is ${node}, $(($(cat "/sys/class/block/${node##*/}/size") / 2048)) MiB."
        echo "Type 'exit' to leave; the VM ends then."
    } >/dev/console 2>&1
    setsid sh -c 'PS1="guest# " exec sh -i </dev/ttyS0 >/dev/ttyS0 2>&1'
    poweroff -f
fi

# --- the loop

stty -F $CONTROL raw -echo 115200
exec <$CONTROL >$CONTROL 2>&1
echo "@@READY $(cut -d' ' -f1 /proc/uptime)"
while read -r verb arguments; do
    case $(type "cmd_$verb" 2>&1) in
    *"not found"*) echo "no such command: $verb"; status=127 ;;
    *)
        # shellcheck disable=SC2086 # the arguments are words
        (case $verb in sh) eval "$arguments" ;; *) "cmd_$verb" $arguments ;; esac)
        status=$?
        ;;
    esac
    echo "@@EXIT $status"
done
