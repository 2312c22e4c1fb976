"""What is asked of a vfio-user server, one numbered line each; cases cite the numbers.

A source is the specification (`spec`, `spec-v1` for its older migration part), the kernel's definitions that it refers
to, PCI, or the client or implementation that was seen to need or do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vfiouser_conformance.case import Case

_TABLE = """
R001 spec a reply has type 1 and repeats id and command
R002 spec msg_size is the size of the message, header included
R003 spec a failure has the ERROR bit and an error number
R004 spec an error reply is a header alone (libvfio-user adds payloads)
R005 spec a command with NO_REPLY is executed and not answered
R006 libvfio-user a failing command with NO_REPLY is not answered either
R007 spec commands take effect in order, posted ones too
R008 spec ids may repeat while outstanding
R009 spec,QEMU pipelined commands are answered in order
R010 libvfio-user an unknown command is refused
R011 libvfio-user command 0 and commands of a generation that is not offered are refused
R012 libvfio-user DMA_READ and DMA_WRITE from the client are refused
R013 spec a reply that nobody waits for is not executed
R014 libvfio-user a message of an undefined type is not executed
R015 libvfio-user a msg_size below 16 is an error
R016 libvfio-user a command that needs a payload is refused without one
R017 spec DEVICE_RESET has no payload
R018 libvfio-user a giant msg_size is not waited for
R019 robustness the body of a bad message is never parsed as a header
R020 stream a header may come in pieces
R021 stream a body may come in pieces
R022 spec reserved flag bits of a command are ignored
R023 spec ERROR bit and error field of a command are ignored
R024 spec a client may leave in the middle of a message
R025 QEMU-v1 GET_INFO may have a longer payload
R026 libvfio-user a descriptor that no command wants is closed, the command executed
R027 libvfio-user many such descriptors are closed, too
R028 QEMU a descriptor comes with the header of its reply
R029 libvfio-user failing commands do not leak descriptors
R030 spec a client may come back
R031 spec two clients at a time are not mixed
R032 spec the end of a connection ends its maps and descriptors
R033 spec a client may leave before it reads its reply
R040 spec VERSION comes first
R041 spec version data is optional
R042 spec the minor version is at most the proposed one
R043 spec a minor version that the server does not know is lowered
R044 spec an unknown major version is turned down
R045 spec a VERSION without a whole version number is turned down
R046 spec a VERSION without payload is turned down
R047 libvfio-user version data without NUL is turned down
R048 libvfio-user version data that is not JSON is turned down
R049 libvfio-user capabilities that are not an object are refused
R050 libvfio-user max_msg_fds that is not an integer is refused
R051 libvfio-user max_msg_fds out of range is turned down
R052 libvfio-user max_data_xfer_size that is not a number is refused
R053 libvfio-user a malformed migration capability is turned down
R054 spec-v1 of two migration page sizes the smaller is used
R055 libvfio-user a malformed twin_socket capability is turned down
R056 spec a granted twin socket comes as descriptor fd_index of the reply
R057 spec a twin socket is not granted unasked
R058 libvfio-user no twin socket for a client that takes no descriptors
R059 spec unknown members are ignored
R060 spec the reply's capabilities were proposed and have the right types
R061 QEMU the VERSION reply is not longer than the request, minor 0
R062 QEMU-v1 the VERSION reply is not longer than 120 bytes for the v1 request
R063 spec the server claims write_multiple only if REGION_WRITE_MULTI works
R064 QEMU max_msg_fds of the reply is at most 16
R065 QEMU max_data_xfer_size of the reply is between config size and 64 MiB
R066 libvfio-user a descriptor with VERSION is closed
R067 libvfio-user VERSION is answered even with NO_REPLY
R068 libvfio-user a second VERSION is refused
R069 spec version data ends with a counted NUL
R070 spec every capability has a default
R071 spec the client's max_data_xfer_size limits DMA messages
R080 spec GET_INFO has 16 bytes; PCI has 9 regions and 5 IRQ types
R081 spec,kernel a too small argsz or payload of GET_INFO is refused
R082 spec a larger argsz changes nothing, of GET_INFO and GET_IRQ_INFO
R083 rust-vmm argsz 32 is accepted for GET_INFO and GET_IRQ_INFO
R084 libvfio-user other request fields of GET_INFO are ignored
R085 spec every region below num_regions is described
R086 spec,kernel a region index beyond is refused
R087 spec an unimplemented region has flags 0 and size 0
R088 spec,kernel a too small argsz or payload of GET_REGION_INFO is refused
R089 spec a larger argsz changes nothing for a region without capabilities
R090 spec with argsz 32 the short form comes: full argsz, no capabilities, no descriptor
R091 libvfio-user with an argsz in between nothing comes in part
R092 spec with the full argsz all comes, with one descriptor if mappable
R093 spec no reply is larger than argsz
R094 QEMU CAPS never comes with cap_offset 0
R095 spec,kernel sparse areas are well-formed
R096 spec,kernel the capability chain is well-formed
R097 spec a mapped area shows what messages show
R098 spec info.offset is added to an area's offset
R099 PCI BAR sizes are powers of two and match their registers
R100 PCI the region behind a 64-bit BAR is empty
R101 PCI config space has 256 or 4096 bytes
R102 spec GET_IRQ_INFO has 16 bytes and describes each type
R103 spec,kernel an IRQ index beyond is refused
R104 spec,kernel a too small argsz or payload of GET_IRQ_INFO is refused
R105 kernel INTx is maskable and masks itself
R106 libvfio-user a type without vectors has count 0
R107 spec the full region info agrees with the short one
R110 spec REGION_READ repeats offset, region, count before the data
R111 spec REGION_WRITE repeats offset, region, count
R112 spec what is written is read
R113 spec a region of size 0 cannot be accessed
R114 spec a region that does not exist cannot be accessed
R115 spec an access does not reach beyond its region
R116 spec offset and count do not wrap
R117 spec an access is not larger than max_data_xfer_size
R118 spec a short payload is refused
R119 spec the data of a write has the length that count says
R120 libvfio-user surplus bytes of a read's request are ignored
R121 spec an access of 0 bytes succeeds
R122 libvfio-user an access of 0 bytes beyond the region is refused
R123 QEMU config space can be read in any width at any offset
R124 QEMU config space can be read as a whole
R125 spec a config space of 256 bytes ends there
R126 PCI BAR registers keep their size mask
R127 spec messages can access a mappable region, too
R128 QEMU an 8-byte access reaches the device as one
R129 spec the READ and WRITE flags of a region are kept
R130 libvfio-user the device's error number reaches the client
R131 spec a read gives no more than asked for
R132 spec a transfer of max_data_xfer_size works
R133 PCI the ROM register agrees with the ROM region
R140 spec DMA_MAP with a descriptor
R141 spec DMA_MAP without a descriptor
R142 spec a too small payload or argsz of DMA_MAP is refused
R143 libvfio-user a larger argsz or payload of DMA_MAP is accepted
R144 spec unknown DMA_MAP flags are refused
R145 libvfio-user MMAP and FILE_IO need a descriptor
R146 libvfio-user the same mapping twice succeeds (spec: EEXIST)
R147 spec an overlapping mapping is refused, the old one stays
R148 spec another mapping of a mapped range is refused
R149 libvfio-user a mapping beyond the server's limit is refused
R150 spec one mapping too many is refused, the others stay
R151 kernel a mapping of size 0 is refused
R152 kernel a mapping that wraps is refused
R153 libvfio-user a mapping may end at 2^64
R154 robustness a mapping beyond the end of its file does no harm
R155 libvfio-user a descriptor that cannot be mapped is refused and closed
R156 libvfio-user a read-only file cannot be mapped for writing
R157 QEMU a read-only mapping works and is never written
R158 libvfio-user a second descriptor of DMA_MAP is closed
R159 spec device and client see the same mapped memory
R160 spec a mapping's offset in the file is used
R161 spec DMA_UNMAP repeats its 24 bytes
R162 spec unmapping nothing is ENOENT
R163 spec unmapping a part, or more than one mapping, is refused
R164 spec a too small payload or argsz of DMA_UNMAP is refused
R165 libvfio-user unknown DMA_UNMAP flags are refused
R166 libvfio-user DMA_UNMAP of everything
R167 libvfio-user DMA_UNMAP of everything takes no address and no bitmap
R168 spec no DMA after DMA_UNMAP
R169 spec DMA_UNMAP is answered when DMA has stopped
R170 robustness mapping and unmapping leaks nothing
R171 QEMU the device's own BAR is mapped for DMA without descriptor
R172 QEMU a burst of maps and unmaps is answered in order
R173 spec-v1 DMA_UNMAP gives the dirty bitmap
R174 libvfio-user DMA_UNMAP with a bad bitmap request is refused, the mapping stays
R175 libvfio-user surplus bytes of DMA_UNMAP are ignored
R176 spec an unmapped range can be mapped again
R180 spec an eventfd is signalled when the device interrupts
R181 spec,kernel a too small payload or argsz of SET_IRQS is refused
R182 spec,kernel an unknown IRQ index is refused
R183 spec,kernel exactly one action
R184 spec,kernel exactly one kind of data
R185 kernel start is below the number of vectors
R186 kernel start and count stay below the number of vectors
R187 libvfio-user ERR and REQ cannot be masked
R188 kernel ERR and REQ have one vector
R189 libvfio-user count 0 goes with start 0
R190 kernel count 0 goes with TRIGGER and NONE only
R191 spec descriptors go with EVENTFD only
R192 spec as many descriptors as vectors
R193 spec as many booleans as vectors
R194 kernel a type is disabled as a whole
R195 spec,kernel vectors are de-assigned exactly
R196 spec,kernel a new eventfd replaces the old one
R197 kernel loopback with NONE signals each vector
R198 kernel loopback with BOOL signals the chosen vectors
R199 kernel masking and unmasking
R200 libvfio-user UNMASK with an eventfd leaks nothing
R201 libvfio-user unknown high flags of SET_IRQS are ignored
R202 kernel a type without vectors can be disabled
R203 QEMU a first assignment without a descriptor enables MSI-X
R204 QEMU vectors are set in pieces
R205 kernel each type has eventfds of its own
R206 spec a vector without eventfd can be triggered
R207 spec an eventfd gets 8 bytes with a value of at least 1
R208 kernel INTx masks itself until it is unmasked
R209 rust-vmm all vectors are set in one message
R210 spec flags and count of GET_REGION_IO_FDS are 0
R211 spec a bad argsz of GET_REGION_IO_FDS is refused
R212 spec a region index beyond is refused
R213 libvfio-user a region without sub-regions has count 0
R214 spec a small argsz gives the count and no descriptors
R215 spec the full argsz gives entries and their descriptors
R216 spec,libvfio-user an entry has 40 or 48 bytes
R217 spec writing an ioeventfd notifies the device
R218 libvfio-user an empty region has no sub-regions
R220 spec REGION_WRITE_MULTI that was not agreed is refused
R221 spec,QEMU many writes in one message are applied in order
R222 spec REGION_WRITE_MULTI reports how many writes were done
R223 spec a malformed REGION_WRITE_MULTI is refused
R224 robustness a giant wr_cnt is refused
R225 spec a write that fails ends a REGION_WRITE_MULTI
R230 spec DEVICE_RESET resets the device
R231 libvfio-user DEVICE_RESET may have a payload
R232 spec DEVICE_RESET with NO_REPLY is silent
R233 spec maps survive DEVICE_RESET
R234 spec,kernel DEVICE_RESET leads to RUNNING from every migration state
R235 spec a new client finds a device as it was left, or RUNNING
R236 spec maps and eventfds end with the connection
R237 spec registers survive the connection
R238 QEMU QEMU's reset sequence succeeds
R240 spec a short DEVICE_FEATURE is refused
R241 spec,kernel the migration feature has STOP_COPY
R242 spec a small argsz of the migration feature is refused
R243 spec a larger argsz changes nothing
R244 spec the migration feature cannot be set
R245 spec PROBE repeats its request
R246 spec PROBE of an unsupported method fails
R247 spec PROBE alone asks whether a feature exists
R248 spec PROBE of GET and SET together
R249 libvfio-user PROBE with too small an argsz is refused
R250 spec GET and SET exclude each other, one is needed
R251 spec unknown flags and features are refused
R252 libvfio-user a device without migration has no features
R253 spec SET with too small an argsz is refused
R254 robustness SET of the state needs the state
R255 spec a SET reply repeats the request
R256 spec REPORT with too small an argsz is refused
R260 spec,kernel a fresh device is RUNNING
R261 spec,kernel every arc between states
R262 spec,kernel intermediate states are entered in order
R263 kernel states that do not exist are refused
R264 kernel STOP_COPY to PRE_COPY is refused
R265 spec the current state may be set
R266 kernel a failing transition tells its error
R267 spec SET is answered when the state is reached
R268 spec MIG_DATA_READ needs a saving state
R269 spec MIG_DATA_READ goes on where it ended
R270 spec the stream ends with a short read and stays ended
R271 spec no short read before the end in STOP_COPY
R272 spec the client's max_data_xfer_size limits MIG_DATA_READ
R273 spec a bad MIG_DATA_READ is refused
R274 spec a short MIG_DATA_READ reply is short (libvfio-user pads)
R275 libvfio-user MIG_DATA_READ of 0 bytes
R276 libvfio-user a failing read tells its error
R277 spec MIG_DATA_WRITE in RESUMING
R278 spec MIG_DATA_WRITE needs RESUMING
R279 spec a bad MIG_DATA_WRITE is refused
R280 libvfio-user MIG_DATA_WRITE of 0 bytes
R281 spec the stream may be cut anywhere
R282 spec,kernel a truncated stream is refused
R283 kernel a stopped device still answers commands
R284 kernel a stopped device does nothing
R285 kernel a device in PRE_COPY works
R286 spec,kernel a restored device is the saved one
R287 kernel a second save starts again
R288 kernel a cancelled pre-copy can start again
R289 kernel without PRE_COPY the state is refused
R290 spec logging starts and tells its page size
R291 spec page size 0 is refused
R292 libvfio-user logging may be started twice (kernel refuses)
R293 libvfio-user logging started with another page size is refused
R294 spec a page size that is not a power of two is not used
R295 robustness ranges that are not there are refused
R296 libvfio-user logging may be stopped twice
R297 spec a clean report is all zero and exact
R298 spec a page that the device wrote is reported
R299 kernel a report clears what it reports
R300 kernel a report may have another page size
R301 spec a bad report is refused
R302 libvfio-user no report without logging
R303 libvfio-user a report of what is not mapped is ENOENT
R304 kernel a report of any range
R305 kernel bit n%8 of byte n//8 is page n
R306 libvfio-user what is mapped after the start is logged
R307 spec reads are not logged
R308 spec a bitmap is of whole 64-bit words, padding zero
R309 kernel a write across pages makes both dirty
R310 spec ranges limit what has to be logged
R311 libvfio-user a new start forgets old bits
R312 libvfio-user logging ends with the connection
R320 spec-v1 one region is the migration region
R321 spec-v1 its description
R322 spec-v1 VERSION tells migration.pgsize
R323 spec-v1 device_state begins as running
R324 libvfio-user-v1 registers are accessed with their size
R325 spec-v1 the reserved register is ignored
R326 spec-v1 the allowed transitions
R327 spec-v1 the forbidden transitions
R328 spec-v1 invalid states are refused
R329 QEMU-v1 self transitions succeed
R330 QEMU-v1 pre-copy can be cancelled
R331 QEMU-v1 a stopped device can go to stop-and-copy
R332 libvfio-user-v1 a failing transition keeps the state
R333 kernel reserved bits do no harm
R334 spec-v1 the stop-and-copy loop
R335 spec-v1 the pre-copy loop and the switch
R336 spec-v1 data_offset is constant in an iteration
R337 libvfio-user-v1 data_offset needs pending_bytes first
R338 libvfio-user-v1 pending_bytes stays 0 at the end
R339 libvfio-user-v1 read-only registers
R340 QEMU-v1 data in pieces of 1 to 8 bytes
R341 spec-v1 data through a mapping
R342 libvfio-user-v1 dead space
R343 spec-v1 a restored device is the saved one
R344 QEMU-v1 a chunk may be written in parts
R345 spec-v1 DEVICE_RESET leads to running
R346 kernel DEVICE_RESET leads to running from stopped states, too
R347 libvfio-user-v1 a new client finds the device running
R348 QEMU-v1 a stopped device still answers commands
R349 libvfio-user-v1 logging may be started and stopped twice
R350 spec-v1 a short DIRTY_PAGES is refused
R351 libvfio-user-v1 DIRTY_PAGES without migration is refused
R352 spec-v1 DIRTY_PAGES has exactly one flag
R353 libvfio-user-v1 the bitmap is at byte 40 of the payload
R354 spec-v1 a small argsz gets the needed size and leaks nothing
R355 spec-v1 a bad GET is refused
R356 spec-v1 a wrong page size or bitmap size is refused
R357 kernel a GET of any range
R358 libvfio-user-v1 memory without descriptor is the client's to log
R359 libvfio-user-v1 no GET before START
R360 QEMU-v1 DMA_UNMAP with a bitmap goes by bitmap.size
R361 spec-v1 DIRTY_PAGES works in stopped states
R370 spec DMA_READ has address and count
R371 spec DMA_READ's data begin at byte 16
R372 spec DMA_WRITE has its data at byte 16
R373 spec an error reply is a failed DMA
R374 libvfio-user a reply that does not fit is an error
R375 spec DMA is cut to the client's max_data_xfer_size
R376 QEMU commands are served while DMA is outstanding
R377 spec with a twin socket DMA goes there only
R378 spec no DMA message for what is not mapped
R379 spec a client may leave while DMA is outstanding
R380 QEMU-v1 a header alone may answer DMA_WRITE
R390 QEMU QEMU attaches
R391 QEMU every answer comes within 5 s
R392 QEMU interrupts reach a guest
R393 QEMU QEMU's reset works
R394 QEMU messages reach private memory
R395 QEMU a flood of writes is applied in order
R396 QEMU a BAR may be mapped in part
R397 QEMU a device can be unplugged
R398 QEMU a killed client leaves the server fit
R399 QEMU message ids need not be consecutive
R400 rust-vmm replies have the sizes that a fixed-size client reads
R401 libvfio-user the sample client's sequence
R411 PCI vendor, device, revision, class and header type are read-only
R412 PCI the headers of capabilities are read-only
R413 PCI the size of the MSI-X table is read-only, enable and mask bits are not
R414 PCI the number of possible MSI vectors is read-only
R415 PCI a function level reset resets the function, and its bit reads as 0
R416 libvfio-user maps survive a function level reset
R417 PCI the capabilities register of power management is read-only
R418 PCI the capabilities registers of PCI Express are read-only
R419 PCI what extended capabilities say about the function is read-only
R420 robustness what device capabilities 2 lacks cannot be enabled
R421 PCI a BAR may have 4 GiB and more, over two registers
R422 libvfio-user the server refuses GET_REGION_IO_FDS with much room, or answers with its descriptors
R423 libvfio-user several sub-regions share a descriptor that comes once
R424 robustness a signalled ioeventfd is read
R425 libvfio-user a VERSION above the maximal size is turned down, and nothing else suffers
R426 libvfio-user a trigger adds 1 to the count of the eventfd
R427 libvfio-user a mapping above the size limit is refused or harmless
R428 libvfio-user a mapping above a limit that was not announced is refused or harmless
R429 libvfio-user DMA_UNMAP with much room is refused or done like any other
R430 libvfio-user a bitmap that no reply can hold is refused
R431 libvfio-user accesses of odd sizes and over two registers are refused or whole
R432 robustness MIG_DATA_WRITE over the announced limit is refused
R433 robustness a kept stream can be loaded again
R434 robustness msg_size of a MIG_DATA_READ reply leaves what size says
R435 QEMU the sequence of the client with migration
R436 rust-vmm nothing is asked of a client that serves no commands
R437 robustness logging can be started where there is nothing to log
R438 robustness a device whose load failed does not run
R439 libvfio-user a device that cannot be quiesced fails the command with its own error
R440 QEMU the reply to a SET of the state has data_fd -1
R441 QEMU MIG_DATA_SIZE is answered
R442 QEMU a request for the figures of pre-copy does no harm
R443 QEMU P2P states, where they are offered, lead where those beside them lead
R444 QEMU a stream that ends in zeros is not run
R445 QEMU a load that breaks off inside a message is not run
R446 QEMU a reset after a refused SET succeeds
R447 QEMU logging of a pointer instead of a range is refused
"""

#: What the specification, or the kernel's definitions that it refers to, say where it is not plain from the text of the
#: message: their own words.
SENTENCES: Mapping[str, str] = {
    "R004": "If an error occurs, the reply message must only include the reply header.",
    "R005": "Each command message must be replied to with a reply message, unless the message sets the No_Reply bit.",
    "R007": "The server will process commands in the order they are received.",
    "R008": "Message IDs belong entirely to the sender, can be re-used (even concurrently).",
    "R013": "Reply (value 0x1) indicates a reply message acknowledging a previous command with the same message ID.",
    "R024": "Both the client and the server need to know how to handle such events [of a disconnect].",
    "R032": "All client memory regions are unmapped and cleaned up (including closing any passed file descriptors).",
    "R033": "Both the client and the server need to know how to handle such events [of a disconnect].",
    "R082": "This must be at least the size of the struct above.",
    "R147": "A command to map over an existing region must be failed by the server.",
    "R169": "The server must release all references to that DMA region before replying.",
    "R235": "The device state should otherwise be retained.",
    "R379": "The server and the client can disconnect from each other, either intentionally or unexpectedly.",
}
#: Sources that can demand something of a server; all others tell what somebody does or needs.
BINDING = frozenset({"spec", "spec-v1", "kernel", "PCI"})

#: Requirements that no case can decide from outside, and where they are looked after instead.
NOT_FROM_OUTSIDE: Mapping[str, str] = {
    "R149": "the limit is the server's own, and it need not have one",
    "R217": "what a notified device does is its own business",
    "R276": "needs a device whose migration can be made to fail",
    "R310": "a server may log more than it was asked to",
    "R439": "needs a device whose quiescing can be made to fail",
    "R332": "needs a device whose migration can be made to fail",
}


@dataclass(frozen=True, slots=True)
class Requirement:
    """What the specification, the kernel, PCI or a client asks for.

    Args:
        source: where it comes from.
        text: what it asks for.
    """

    source: str
    text: str

    @property
    def binds(self) -> bool:
        """Whether a MUST may rest on it."""
        return not BINDING.isdisjoint(self.source.split(", "))


def _read() -> Mapping[str, Requirement]:
    rows = (line.split(" ", 2) for line in _TABLE.strip().splitlines())
    return {number: Requirement(source.replace(",", ", "), text) for number, source, text in rows}


REQUIREMENTS: Mapping[str, Requirement] = _read()


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which requirements a set of cases tests.

    Args:
        covered: ids that a case cites.
        missing: ids that none cites although one could.
        outside: ids that no case can decide.
    """

    covered: tuple[str, ...]
    missing: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def share(self) -> float:
        """Part of all requirements that is covered, 0 to 1."""
        return len(self.covered) / len(REQUIREMENTS)


def coverage(cases: Iterable[Case]) -> Coverage:
    """Compute what these cases test."""
    cited = {number for case in cases for number in case.requirements}
    covered = tuple(number for number in REQUIREMENTS if number in cited)
    rest = [number for number in REQUIREMENTS if number not in cited]
    missing = tuple(number for number in rest if number not in NOT_FROM_OUTSIDE)
    return Coverage(covered, missing, tuple(number for number in rest if number in NOT_FROM_OUTSIDE))
