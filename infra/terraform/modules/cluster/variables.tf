variable "name" {
  description = "Name of the cluster."
  type        = string
}

variable "kubernetes_version" {
  description = "Kubernetes minor version."
  type        = string
}

variable "api_cidrs" {
  description = "Networks from which the API is reached."
  type        = list(string)
}

variable "subnets" {
  description = "Private subnets, one a zone."
  type        = list(string)
}

variable "groups" {
  description = "Node groups by role: head, teacher, student."
  type = map(object({
    instance_types = list(string)
    capacity       = string
    min            = number
    max            = number
    disk_gib       = number
    gpu            = bool
    subnets        = list(string)
  }))
}
