"""Numbers and structures of the kernel's interface, named as in its headers.

Spec: linux/vfio.h and linux/iommufd.h (include/uapi). All structures are in native byte order and naturally aligned.
"""

from __future__ import annotations

import struct

_VFIO_IO = (ord(";") << 8) + 100
_IOMMUFD_IO = (ord(";") << 8) + 0x80

# Container and group
VFIO_API_VERSION = 0
VFIO_GET_API_VERSION = _VFIO_IO + 0
VFIO_CHECK_EXTENSION = _VFIO_IO + 1
VFIO_SET_IOMMU = _VFIO_IO + 2
VFIO_GROUP_GET_STATUS = _VFIO_IO + 3
VFIO_GROUP_SET_CONTAINER = _VFIO_IO + 4
VFIO_GROUP_GET_DEVICE_FD = _VFIO_IO + 6
VFIO_TYPE1V2_IOMMU = 3
VFIO_GROUP_FLAGS_VIABLE = 1 << 0

# Device
VFIO_DEVICE_GET_INFO = _VFIO_IO + 7
VFIO_DEVICE_GET_REGION_INFO = _VFIO_IO + 8
VFIO_DEVICE_GET_IRQ_INFO = _VFIO_IO + 9
VFIO_DEVICE_SET_IRQS = _VFIO_IO + 10
VFIO_DEVICE_RESET = _VFIO_IO + 11
VFIO_DEVICE_FEATURE = _VFIO_IO + 17
VFIO_DEVICE_BIND_IOMMUFD = _VFIO_IO + 18
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _VFIO_IO + 19
VFIO_MIG_GET_PRECOPY_INFO = _VFIO_IO + 21
VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18
VFIO_DEVICE_FEATURE_MIGRATION = 1
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9
VFIO_DEVICE_FEATURE_DMA_BUF = 11

# Type 1 IOMMU
VFIO_IOMMU_GET_INFO = _VFIO_IO + 12
VFIO_IOMMU_MAP_DMA = _VFIO_IO + 13
VFIO_IOMMU_UNMAP_DMA = _VFIO_IO + 14
VFIO_IOMMU_DIRTY_PAGES = _VFIO_IO + 17
VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1
VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3
VFIO_DMA_MAP_FLAG_READ = 1 << 0
VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2

# iommufd
IOMMU_IOAS_ALLOC = _IOMMUFD_IO + 0x1
IOMMU_IOAS_IOVA_RANGES = _IOMMUFD_IO + 0x4
IOMMU_IOAS_MAP = _IOMMUFD_IO + 0x5
IOMMU_IOAS_UNMAP = _IOMMUFD_IO + 0x6
IOMMU_IOAS_MAP_FILE = _IOMMUFD_IO + 0xF
IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2

#: struct vfio_group_status: argsz, flags.
GROUP_STATUS = struct.Struct("=II")
#: struct vfio_device_info: argsz, flags, num_regions, num_irqs, cap_offset, padding.
DEVICE_INFO = struct.Struct("=IIIIII")
#: struct vfio_region_info: argsz, flags, index, cap_offset, size, offset.
REGION_INFO = struct.Struct("=IIIIQQ")
#: struct vfio_irq_info: argsz, flags, index, count.
IRQ_INFO = struct.Struct("=IIII")
#: struct vfio_irq_set without its data: argsz, flags, index, start, count.
IRQ_SET = struct.Struct("=IIIII")
#: struct vfio_device_feature without its data: argsz, flags.
DEVICE_FEATURE = struct.Struct("=II")
#: struct vfio_device_feature_dma_buf with one range: region_index, open_flags, flags, nr_ranges, offset, length.
FEATURE_DMA_BUF = struct.Struct("=IIIIQQ")
#: struct vfio_device_feature_migration (flags), and vfio_device_feature_mig_data_size (stop_copy_length).
FEATURE_U64 = struct.Struct("=Q")
#: struct vfio_device_feature_mig_state: device_state, data_fd.
FEATURE_MIG_STATE = struct.Struct("=Ii")
#: struct vfio_precopy_info: argsz, flags, initial_bytes, dirty_bytes.
PRECOPY_INFO = struct.Struct("=IIQQ")
#: struct vfio_device_feature_dma_logging_control: page_size, num_ranges, reserved, ranges.
FEATURE_DMA_LOGGING_CONTROL = struct.Struct("=QIIQ")
#: struct vfio_device_feature_dma_logging_report: iova, length, page_size, bitmap.
FEATURE_DMA_LOGGING_REPORT = struct.Struct("=QQQQ")
#: struct vfio_device_bind_iommufd: argsz, flags, iommufd, out_devid.
BIND_IOMMUFD = struct.Struct("=IIiI")
#: struct vfio_device_attach_iommufd_pt: argsz, flags, pt_id.
ATTACH_IOMMUFD_PT = struct.Struct("=III")
#: struct vfio_iommu_type1_info: argsz, flags, iova_pgsizes, cap_offset.
IOMMU_TYPE1_INFO = struct.Struct("=IIQI4x")
#: struct vfio_info_cap_header: id, version, next.
CAP_HEADER = struct.Struct("=HHI")
#: struct vfio_iommu_type1_dma_map: argsz, flags, vaddr, iova, size.
TYPE1_DMA_MAP = struct.Struct("=IIQQQ")
#: struct vfio_iommu_type1_dma_unmap: argsz, flags, iova, size.
TYPE1_DMA_UNMAP = struct.Struct("=IIQQ")
#: struct vfio_iommu_type1_dirty_bitmap without its data: argsz, flags.
TYPE1_DIRTY_BITMAP = struct.Struct("=II")
#: struct vfio_bitmap: pgsize, size, data.
BITMAP = struct.Struct("=QQQ")
#: struct iommu_ioas_alloc: size, flags, out_ioas_id.
IOAS_ALLOC = struct.Struct("=III")
#: struct iommu_ioas_iova_ranges: size, ioas_id, num_iovas, reserved, allowed_iovas, out_iova_alignment.
IOAS_IOVA_RANGES = struct.Struct("=IIIIQQ")
#: struct iommu_iova_range and struct vfio_iova_range: first and last address; and the beginning of
#: struct vfio_iommu_type1_dirty_bitmap_get: iova, size.
IOVA_RANGE = struct.Struct("=QQ")
#: struct iommu_ioas_map: size, flags, ioas_id, reserved, user_va, length, iova.
IOAS_MAP = struct.Struct("=IIIIQQQ")
#: struct iommu_ioas_map_file: size, flags, ioas_id, fd, start, length, iova.
IOAS_MAP_FILE = struct.Struct("=IIIiQQQ")
#: struct iommu_ioas_unmap: size, ioas_id, iova, length.
IOAS_UNMAP = struct.Struct("=IIQQ")
