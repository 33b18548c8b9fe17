"""Students of many shapes, each healed by several losses, from one record of the teacher."""
