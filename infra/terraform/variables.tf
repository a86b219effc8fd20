variable "name" {
  description = "Name of the EKS cluster, and prefix of everything else."
  type        = string
  default     = "distill-ray"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,30}$", var.name))
    error_message = "name is 3 to 31 lower-case letters, digits and hyphens, a letter first."
  }
}

variable "region" {
  description = "AWS region."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region is an AWS region such as us-east-1."
  }
}

variable "bucket" {
  description = "Name of the S3 bucket that is made for all artefacts; unique in all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket is 3 to 63 lower-case letters, digits and hyphens (no dots: TLS certificates do not match them)."
  }
}

variable "root_prefix" {
  description = "Folder of the bucket under which artefacts lie: [storage] root is s3://BUCKET/ROOT_PREFIX."
  type        = string
  default     = "prod"

  validation {
    condition     = can(regex("^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", var.root_prefix))
    error_message = "root_prefix is a path without slashes at its ends, such as prod."
  }
}

variable "sources" {
  description = "What the workloads read besides the root: corpora and models, each as BUCKET/PREFIX of this account or one that lets it in."
  type        = list(string)

  validation {
    condition     = length(var.sources) > 0 && alltrue([for each in var.sources : can(regex("^[a-z0-9][a-z0-9.-]+/[^*?]*$", each))])
    error_message = "sources are BUCKET/PREFIX, without s3:// and without wildcards, at least one; BUCKET/ is all of it."
  }
}

variable "kubernetes_version" {
  description = "Kubernetes minor version of the cluster."
  type        = string
  default     = "1.33"

  validation {
    condition     = can(regex("^1\\.[0-9]{2}$", var.kubernetes_version))
    error_message = "kubernetes_version is such as 1.33."
  }
}

variable "api_cidrs" {
  description = "Networks from which the Kubernetes API is reached, as CIDR. Never the whole Internet."
  type        = list(string)

  validation {
    condition     = length(var.api_cidrs) > 0 && alltrue([for each in var.api_cidrs : can(cidrhost(each, 0)) && !endswith(each, "/0")])
    error_message = "api_cidrs are networks such as 203.0.113.0/24, at least one, none of them /0."
  }
}

variable "vpc_cidr" {
  description = "Network of the VPC: three eighths for nodes and pods, the rest spare but for the way out."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrhost(var.vpc_cidr, 0)) && tonumber(split("/", var.vpc_cidr)[1]) <= 20
    error_message = "vpc_cidr is a network of /20 or larger."
  }
}

variable "head" {
  description = "CPU nodes for heads, drivers and operators: always on demand."
  type = object({
    instance_types = list(string)
    min            = number
    max            = number
    disk_gib       = number
  })
  default = {
    instance_types = ["m7i.4xlarge"]
    min            = 1
    max            = 4
    disk_gib       = 200
  }

  validation {
    condition     = var.head.min >= 1 && var.head.max >= var.head.min && var.head.disk_gib >= 50
    error_message = "head wants 1 <= min <= max and disk_gib >= 50: the operators run on it."
  }
}

variable "teacher" {
  description = "GPU nodes of teachers, from none to max; capacity is SPOT or ON_DEMAND."
  type = object({
    instance_types = list(string)
    capacity       = string
    max            = number
    disk_gib       = number
  })
  default = {
    instance_types = ["p5.48xlarge"]
    capacity       = "SPOT"
    max            = 4
    disk_gib       = 500
  }

  validation {
    condition     = contains(["SPOT", "ON_DEMAND"], var.teacher.capacity) && var.teacher.max >= 1 && var.teacher.disk_gib >= 100
    error_message = "teacher wants capacity SPOT or ON_DEMAND, max >= 1 and disk_gib >= 100 (the weights are staged there)."
  }
}

variable "student" {
  description = "GPU nodes of training workers, from none to max, all in one zone; capacity is SPOT or ON_DEMAND."
  type = object({
    instance_types = list(string)
    capacity       = string
    max            = number
    disk_gib       = number
  })
  default = {
    instance_types = ["p5.48xlarge"]
    capacity       = "ON_DEMAND"
    max            = 2
    disk_gib       = 1000
  }

  validation {
    condition     = contains(["SPOT", "ON_DEMAND"], var.student.capacity) && var.student.max >= 1 && var.student.disk_gib >= 100
    error_message = "student wants capacity SPOT or ON_DEMAND, max >= 1 and disk_gib >= 100 (checkpoints are staged there)."
  }
}

variable "student_zone" {
  description = "Which of the VPC's zones training workers are in, counted from 0: gradients do not cross zones."
  type        = number
  default     = 0

  validation {
    condition     = var.student_zone >= 0 && var.student_zone <= 2
    error_message = "student_zone is 0, 1 or 2."
  }
}

variable "lifecycle_days" {
  description = "Days until S3 removes: checkpoints and trained students of runs (exports in models/ stay), dead letters, overwritten or deleted versions, parts of uploads that were never completed."
  type = object({
    checkpoints  = number
    dead_letters = number
    noncurrent   = number
    uploads      = number
  })
  default = {
    checkpoints  = 180
    dead_letters = 90
    noncurrent   = 30
    uploads      = 7
  }

  validation {
    condition     = alltrue([for days in values(var.lifecycle_days) : days >= 1 && floor(days) == days])
    error_message = "lifecycle_days are whole days, 1 or more."
  }

  validation {
    condition     = var.lifecycle_days.checkpoints >= 30
    error_message = "lifecycle_days.checkpoints is 30 or more: a run that is still going on must keep its own."
  }
}
