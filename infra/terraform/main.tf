module "store" {
  source         = "./modules/store"
  bucket         = var.bucket
  root_prefix    = var.root_prefix
  lifecycle_days = var.lifecycle_days
}

module "images" {
  source = "./modules/images"
  name   = var.name
}

module "network" {
  source  = "./modules/network"
  name    = var.name
  cluster = var.name
  cidr    = var.vpc_cidr
}

module "cluster" {
  source             = "./modules/cluster"
  name               = var.name
  kubernetes_version = var.kubernetes_version
  api_cidrs          = var.api_cidrs
  subnets            = module.network.private_subnets

  groups = {
    # A head that is taken away takes the run's cluster with it: never on spot.
    head    = merge(var.head, { capacity = "ON_DEMAND", gpu = false, subnets = module.network.private_subnets })
    teacher = merge(var.teacher, { min = 0, gpu = true, subnets = module.network.private_subnets })
    student = merge(var.student, { min = 0, gpu = true, subnets = [module.network.private_subnets[var.student_zone]] })
  }
}
