"""Students of many shapes, each trained with several losses from one recorded teacher."""
